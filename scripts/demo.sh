#!/usr/bin/env bash
# Lift, Map, Detect on the images and the model that ship with the repository: is this Fashion-MNIST or MNIST?
# Then a detector that decides about single images: which of the pictures in demo/incoming are no clothes?
#
#   bash scripts/demo.sh
#
# Run again, it uses what is there. The variables below may be set from outside, such as
# SAMPLER=best REPS=10 WORKDIR=results/demo_best.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

CHECKPOINT=${CHECKPOINT:-pretrained/fashion_mnist_small.safetensors}
WORKDIR=${WORKDIR:-results/demo}
SAMPLER=${SAMPLER:-fast}
REPS=${REPS:-4} # reconstructions per image
STEPS=${STEPS:-} # network evaluations per reconstruction, if not the sampler's own
METRICS=${METRICS:-MSE,SSIM,STLPIPS}
HELD_BACK=${HELD_BACK:-500}    # images that calibrate the detector
CARD_IMAGES=${CARD_IMAGES:-5}  # of which each kind of made-up foreign image is made
METHOD=${METHOD:-lmd}          # the quicker one; auto takes half as long again and sees more

started=$SECONDS
bash create_environment.sh --learned
installed=$SECONDS

"$PYTHON" recon.py --config configs/subvp/fashion_mnist_small.py --sampler "$SAMPLER" ${STEPS:+--steps "$STEPS"} \
  --ckpt_path "$CHECKPOINT" --in_domain demo/fashion_mnist.npz --out_of_domain demo/mnist.npz \
  --mask_type checkerboard_alt --mask_num_blocks 8 --reps_per_image "$REPS" --workdir "$WORKDIR"
reconstructed=$SECONDS

folder=$WORKDIR/checkerboard_alt_blocks8_reps$REPS
"$PYTHON" detect.py --result_path "$folder" --reps "$REPS" --metric "$METRICS"
scored=$SECONDS

"$PYTHON" calibrate.py --ckpt_path "$CHECKPOINT" --in_domain demo/held_back.npz --detector "$WORKDIR/detector" \
  --max_images "$HELD_BACK" --card_images "$CARD_IMAGES" --method "$METHOD"
calibrated=$SECONDS
"$PYTHON" predict.py --detector "$WORKDIR/detector" --images demo/incoming --output "$WORKDIR/incoming"
predicted=$SECONDS

echo "environment $((installed - started)) s, reconstruction $((reconstructed - installed)) s," \
  "scoring $((scored - reconstructed)) s, calibration $((calibrated - scored)) s, decisions $((predicted - calibrated)) s"
echo "pictures: $folder/*.png"
echo "report: $WORKDIR/incoming/report.html"
