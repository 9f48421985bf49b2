#!/usr/bin/env bash
# What compiles the GPU's kernels, where no CUDA toolkit is installed: NVIDIA's own Python wheels, unpacked. Needs no GPU, driver or
# root, about 100 MB of downloads and 270 MB on the disk; nothing of it is needed to run what was built.
#
#   CUDA_HOME=$(bash tests/cuda/toolchain.sh) cargo build --release --features cuda
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# nvcc and ptxas; the compiler behind them; its headers; those of the runtime; and those that cuda_fp16.h wants.
wheels=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85)
dir=$PWD/target/cuda-toolchain

if [ ! -x "$dir/bin/nvcc" ]; then
    new=$dir.new
    rm -rf "$new" "$dir"
    "${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --only-binary=:all: \
        --target "$new" "${wheels[@]}" >&2
    mv "$new/nvidia/cu13" "$dir" # as a whole, so that a download that broke off is begun again
    rm -r "$new"
fi
echo "$dir"
