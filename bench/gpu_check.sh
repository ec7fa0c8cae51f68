#!/usr/bin/env bash
# One command for a machine with a GPU, offline: measures and tests everything on it in nine minutes
# and leaves one record in bench/results/, which is whole at any moment.
# Exit status: 0 all well, 1 something failed (the record says what), 2 no GPU (nothing written).
# PYTHON chooses the interpreter; it needs torch, triton, numpy and pytest. A native module in
# harmonizer_ext/ that fits is used; otherwise it is compiled, with nvcc, cmake, ninja and pybind11.
# HARMONIZER_STAND_IN=1 runs it without a GPU, see tests/gpu_on_host.py. Arguments: --steps, --output.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/gpu_check.py "$@"
