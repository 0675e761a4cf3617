#!/usr/bin/env bash
# Trains the demo's model from scratch; stopped and run again, it continues. Arguments go to main.py, such as
# --data_root. The model that ships was made with --config.training.precision=bf16 --config.training.compile=on, which
# is quicker on some CPUs (docs/performance.md), and much slower on one without AVX512-BF16 instructions.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

WORKDIR=${WORKDIR:-results/fashion_mnist_small}

bash create_environment.sh
"$PYTHON" main.py --mode train --config configs/subvp/fashion_mnist_small.py --workdir "$WORKDIR" "$@"
last=$(ls -t "$WORKDIR"/checkpoints/checkpoint_*.pth | head -n 1)
"$PYTHON" scripts/inspect_checkpoint.py "$last" --to "$WORKDIR/ema.safetensors"
echo "try it: CHECKPOINT=$WORKDIR/ema.safetensors WORKDIR=$WORKDIR/demo bash scripts/demo.sh"
