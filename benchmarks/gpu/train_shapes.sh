#!/usr/bin/env bash
# Rows 3 and 4 of QUEUE.md: training steps at full size, the stock loop's and ours, checked and timed.
# FAMILY is sd15 or sdxl. WHEELS is a folder of wheels for what the machine lacks (diffusers, tyro, docstring_parser).
set -euo pipefail
cd "$(dirname "$0")/../.."
FAMILY=${FAMILY:-sd15}
BATCHES=${BATCHES:-4 16 32}
PY=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
if [ -n "${WHEELS:-}" ]; then
    $PY -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" "$WHEELS"/*.whl
fi
export PYTHONPATH=.
# shellcheck disable=SC2086  # the batches are words
$PY -m benchmarks.gpu.train_shapes "$FAMILY" --batches $BATCHES --output "$OUT"
