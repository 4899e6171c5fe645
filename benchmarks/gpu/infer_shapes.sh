#!/usr/bin/env bash
# Row 5 of QUEUE.md: denoising steps at full size, the stock loop's and ours, checked and timed.
# WHEELS is a folder of wheels for what the machine lacks (diffusers, tyro, docstring_parser).
set -euo pipefail
cd "$(dirname "$0")/../.."
PY=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
if [ -n "${WHEELS:-}" ]; then
    $PY -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" "$WHEELS"/*.whl
fi
export PYTHONPATH=.
$PY -m benchmarks.gpu.infer_shapes sd15 --batches 1 8 --output "$OUT"
