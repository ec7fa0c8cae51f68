#!/usr/bin/env bash
# One command for a machine with a GPU, offline: builds for that GPU, tests everything on it, runs
# the four compute-sanitizer tools and the benchmark, and leaves one record in bench/results/.
# Exit status: 0 all well, 1 something failed (the record says what), 2 no GPU (nothing written).
# PYTHON chooses the interpreter; it needs torch, triton, numpy, pytest and the build tools, and
# nvcc must be there (HARMONIZER_CUDA=0 checks the Triton kernels alone).
# Arguments go to gpu_check.py: --steps tests,sanitizer,benchmark chooses, --minutes limits.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
started=$(date +%s)
if ! "$python" -c 'import torch' 2> /dev/null; then
  echo "gpu_check: $python cannot import torch; set PYTHON to an interpreter that can" >&2
  exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: no GPU that PyTorch can use on this machine; nothing was run or written" >&2
  exit 2
fi
# sm_80 beside the GPU itself: a module for several GPUs, as users have, and the path without
# clusters compiled as there. All seven would take minutes.
gpus=$("$python" -c 'import torch
print(*{"%d%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})')
HARMONIZER_CUDA=${HARMONIZER_CUDA-1} HARMONIZER_CUDA_ARCHS=${HARMONIZER_CUDA_ARCHS-80 $gpus} \
  "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index --editable .
exec "$python" bench/gpu_check.py --started "$started" "$@"
