#!/bin/bash
# Checks hvdlm on the GPUs of this machine and prints a table: what was checked, how it ended, what was measured.
#
#   make gpu-check, or, where hvdlm is installed, benchmarks/gpu_check.sh [OPTIONS OF PYTEST]
#
# Takes six minutes on one H100 and does not stop at a failure. Runs in .venv, or else with the python3 on the PATH,
# which then has hvdlm and what tests/gpu needs. Where nvcc is, Horovod is built with NCCL meanwhile. Checks run side by
# side, then the speed of one rank is measured alone. The table is also written to runs/gpu_check/table.md, or to
# HVDLM_GPU_RESULTS. HVDLM_GPU_SECONDS: after so many no further check begins.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export HVDLM_GPU_RESULTS=${HVDLM_GPU_RESULTS:-$PWD/runs/gpu_check}
mkdir -p "$HVDLM_GPU_RESULTS"
rm -f "$HVDLM_GPU_RESULTS/horovod.status" "$HVDLM_GPU_RESULTS/table.md"

if [ -x .venv/bin/python ]; then export PATH=$PWD/.venv/bin:$PATH; fi
if ! python3 -m pytest tests/gpu --collect-only >/dev/null 2>&1; then
  echo "gpu_check.sh: error: $(command -v python3) has no hvdlm or not what its tests need: run" \
    "'make gpu-check', which installs them; docs/no-network.md says how without a network" >&2
  exit 1
fi
if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_check.sh: error: PyTorch finds no GPU here: install its CUDA build, or see what nvidia-smi says" >&2
  exit 1
fi
if [ "$(id -u)" -eq 0 ]; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# Beside the first checks, with lower priority, in a session of its own; the checks of Horovod read what came of it.
builder=
if command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
  export HVDLM_CACHE=${HVDLM_CACHE:-$HVDLM_GPU_RESULTS/horovod}
  setsid bash -c 'nice -n 10 python3 -m hvdlm install-horovod >"$HVDLM_GPU_RESULTS/horovod.log" 2>&1
    echo $? >"$HVDLM_GPU_RESULTS/horovod.status"' &
  builder=$!
else
  echo "no nvcc" >"$HVDLM_GPU_RESULTS/horovod.status"
fi

limit=${HVDLM_GPU_SECONDS:-345} status=0
words=(-m needs_gpu -q --tb=short "$@")
python3 -m pytest tests/gpu --ignore tests/gpu/test_speed.py "${words[@]}" --numprocesses 8 --dist loadgroup \
  -o "session_timeout=$((limit - SECONDS))" || status=$?
if [ "$SECONDS" -lt "$limit" ]; then
  python3 -m pytest tests/gpu/test_speed.py "${words[@]}" -o "session_timeout=$((limit - SECONDS))" || status=$?
fi
if [ -n "$builder" ] && kill -0 "$builder" 2>/dev/null; then # it takes longer than all checks
  kill -- "-$builder"
fi
printf '\n%s\n' "All checks, after $SECONDS s:"
cat "$HVDLM_GPU_RESULTS/table.md" || status=1
exit $status
