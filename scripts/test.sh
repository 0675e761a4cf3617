#!/usr/bin/env bash
# Sets up the environment, then checks the style and runs the tests: all, or those that pytest's arguments name.
#
#   bash scripts/test.sh
#   bash scripts/test.sh tests/test_masks.py -k center
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

bash create_environment.sh --test
"$PYTHON" -m ruff check
"$PYTHON" -m ruff format --check
# One process a core, each with one thread. Exit code 5 where no test ran.
OMP_NUM_THREADS=1 "$PYTHON" -m pytest --numprocesses=auto --dist=loadfile "$@"
