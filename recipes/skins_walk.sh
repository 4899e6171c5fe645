#!/usr/bin/env bash
# From parts to installable themes: data, training with both kinds of hints, a batch of skins, a report.
# Minutes on 2 CPU cores. COUNT part sets, STEPS of training, SAMPLING steps, HINTS, OUT.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
OUT=${OUT:-outputs/skins_walk} COUNT=${COUNT:-40} STEPS=${STEPS:-80} SIZE=${SIZE:-512x320} SAMPLING=${SAMPLING:-10}
PROMPTS=${PROMPTS:-$HERE/skins_prompts.txt}

# 1) Parts, as a designer would deliver them; yours go here.
controlfill skin themes "$OUT/parts" --count "$COUNT"

# 2) Two data sets: labels in picture and hint, and no text at all with one hint for all skins.
controlfill prepare skins "$OUT/parts" "$OUT/data-glyphs" --size "$SIZE" --hint glyphs --suffix ""
controlfill prepare skins "$OUT/parts" "$OUT/data-edges" --size "$SIZE" --shared_hint --no_text --suffix ""

for HINT in ${HINTS:-glyphs edges}; do
    # 3) Training, on from the ControlNet that ships.
    controlfill train --config "$HERE/../configs/embedded_skins_finetune.yaml" --max_steps "$STEPS" \
        --image_dir "$OUT/data-$HINT" --output_dir "$OUT/run-$HINT"

    # 4) A batch of skins from a file of prompts, their parts, and themes to install.
    controlfill skin generate "$OUT/skins-$HINT" --control "$OUT/run-$HINT" --size "$SIZE" \
        --num_inference_steps "$SAMPLING" --prompts "$PROMPTS" --hint "$HINT" --theme cskin trime

    # 5) How well they keep to the layout and how well their labels are read.
    controlfill skin report "$OUT/skins-$HINT"
done
