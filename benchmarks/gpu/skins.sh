#!/usr/bin/env bash
# Row 6 of QUEUE.md: the base of keyboard skins trained ten times as long, measured, timed.
# Finished parts are kept in $OUT and not done again.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-outputs/skins_gpu}
PY=${PYTHON:-python3}
export PYTHONPATH=.
began=$SECONDS
$PY recipes/skins_base.py --work_dir "$OUT" --vae_steps 12000 --alone_steps 4000 --steps 24000 \
    --decoder_steps 12000
echo "base and ControlNet: $((SECONDS - began)) s"
$PY -m benchmarks.skins --base "$OUT/base" --control "$OUT/control" --themes 24 --pictures "$OUT/pictures"
began=$SECONDS
$PY train.py --config configs/embedded_skins.yaml --pretrained_model_name_or_path "$OUT/base" \
    --max_steps 600 --output_dir "$OUT/fresh"
$PY -m benchmarks.text_loss --base "$OUT/base" --control "$OUT/fresh" --steps 600 --seeds 3 --pictures 12
echo "text loss: $((SECONDS - began)) s"
