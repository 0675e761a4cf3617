#!/usr/bin/env bash
# Makes a ready environment from the pinned requirements, on a machine with Python >= 3.10 and 10 GB of free disk.
#
#   bash create_environment.sh              what main.py, recon.py and detect.py need
#   bash create_environment.sh --learned    and the weights of the distance STLPIPS (66 MB)
#   bash create_environment.sh --test       and what the tests need
#
# It goes into the active conda environment other than base, else into .venv here; LMD_VENV=FOLDER names another folder.
# Run again, it returns at once where all is there. A .venv that an interrupted run left is made anew.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/environment.sh"

case "$*" in
  "") files=(requirements.txt) ;;
  --learned) files=(requirements.txt requirements-learned.txt) ;;
  --test) files=(requirements.txt requirements-learned.txt requirements-test.txt) ;;
  *) fail "unknown arguments '$*'; the only options are --learned and --test" ;;
esac

works() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# Whether the requirement files installed last, kept in the environment, are those of today.
complete() {
  local file
  for file in "${files[@]}"; do cmp -s "$file" "$LMD_VENV/lmd/$file" || return; done
  works "$PYTHON"
}

make_interpreter() {
  local python
  [ -e "$LMD_VENV/pyvenv.cfg" ] || [ -z "$(ls -A "$LMD_VENV" 2>/dev/null)" ] ||
    fail "$LMD_VENV has no Python >= 3.10; install one there (conda install 'python>=3.10'), or name another folder in LMD_VENV"
  for python in python3 python3.13 python3.12 python3.11 python3.10 none; do works "$python" && break; done
  [ "$python" != none ] || fail "no Python >= 3.10 found; install one, or activate a conda environment"
  "$python" -m venv --clear "$LMD_VENV" || fail "$python could not make $LMD_VENV (its message is above)"
}

install() {
  mkdir -p "$LMD_VENV/lmd/unfinished" # where pip unpacks, too, as /tmp is often a small disk in memory
  TMPDIR=$LMD_VENV/lmd/unfinished "$PYTHON" -m pip install --disable-pip-version-check "${files[@]/#/--requirement=}" || {
    rm -r -- "$LMD_VENV/lmd"
    fail "pip could not install the packages (its message is above); then run again: bash create_environment.sh"
  }
  cp -- "${files[@]}" "$LMD_VENV/lmd/"
  rm -r -- "$LMD_VENV/lmd/unfinished"
}

exec 9<requirements.txt
complete || flock 9 # until another run has finished
if ! complete; then
  if ! works "$PYTHON" || { [ -e "$LMD_VENV/pyvenv.cfg" ] && [ -e "$LMD_VENV/lmd/unfinished" ]; }; then make_interpreter; fi
  install
fi
echo "environment ready: $PYTHON"
