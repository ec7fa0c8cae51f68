#!/usr/bin/env bash
# One command for a machine with a GPU, offline: builds, tests everything on the device, runs the
# four compute-sanitizer tools and the benchmark, and leaves one record in bench/results/.
# Exit status: 0 all well, 1 something failed (the record says what), 2 no GPU (nothing written).
# PYTHON chooses the interpreter; it needs torch, triton, numpy, pytest and the build tools.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: no GPU that PyTorch can use on this machine; nothing was run or written" >&2
  exit 2
fi
"$python" -m pip install --quiet --no-build-isolation --no-deps --no-index --editable .
exec "$python" bench/gpu_check.py "$@"
