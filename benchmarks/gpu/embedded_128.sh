#!/usr/bin/env bash
# Row 1 of QUEUE.md: a larger embedded base and its inpaint ControlNet, trained, measured, timed.
# Finished parts are kept in $OUT and not done again.
set -euo pipefail
cd "$(dirname "$0")/../.."
SIZE=${SIZE:-128}
WORLD=${WORLD:-shapes-full}
OUT=${OUT:-outputs/embedded_${WORLD}_$SIZE}
PY=${PYTHON:-python3}
export PYTHONPATH=.
began=$SECONDS
$PY recipes/embedded_base.py --work_dir "$OUT" --size "$SIZE" --world "$WORLD" \
    --pictures 120000 --vae_steps 4000 --vae_batch 64 --unet_steps 24000 --unet_batch 64
echo "base: $((SECONDS - began)) s"
began=$SECONDS
$PY train.py --config configs/embedded_inpaint.yaml --image_dir "world:$WORLD" \
    --pretrained_model_name_or_path "$OUT/base" \
    --image_size "$SIZE" --batch_size 64 --max_steps 12000 --num_workers 12 --output_dir "$OUT" --resume_from_checkpoint latest
echo "ControlNet: $((SECONDS - began)) s"
control=$(ls -d "$OUT"/controlnet_inpainting_*/final_model | tail -1)
$PY -m controlfill evaluate "world:$WORLD" --image_size "$SIZE" --control "$control" \
    --base "$OUT/base" --output_dir "$OUT/evaluation"
