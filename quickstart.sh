#!/usr/bin/env bash
# From a fresh checkout to a ControlNet of your own and a filled hole, on a CPU, without downloads.
set -euo pipefail
cd "$(dirname "$0")"
STEPS=${STEPS:-600}
OUT=${OUT:-outputs/quickstart}
make --no-print-directory install
PATH="$PWD/.venv/bin:$PATH"
controlfill doctor
controlfill preview world:shapes --image_size 64 --output "$OUT/data_sample.png"
python train.py --image_dir world:shapes --pretrained_model_name_or_path embedded --image_size 64 \
    --batch_size 16 --learning_rate 1e-3 --lr_scheduler cosine --max_steps "$STEPS" --log_steps 10 --output_dir "$OUT"
run=$(ls -d "$OUT"/controlnet_inpainting_* | tail -1)
python infer.py --checkpoint_path "$run/final_model" --input_image docs/pictures/photo.png \
    --input_mask docs/pictures/mask.png --num_inference_steps 20 --output_dir "$OUT/inference" \
    --prompt "orange star on striped navy and white background"
echo "look at $OUT/data_sample.png, $run/logs/panels.png and $OUT/inference/comparison.png"
