#!/usr/bin/env bash
# Compiles, lints and links everything with CUDA on a machine without a GPU, prints what each kernel takes of a GPU, and runs the
# tests that such a machine can run: the commands say in one line what is missing, and compute on the CPU. candle's kernels are only
# compiled, for one GPU: a binary with them is linked with libraries that are not here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ -z "${NVCC:-}${CUDA_HOME:-}" ] && ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then
    CUDA_HOME=$(bash tests/cuda/toolchain.sh)
    export CUDA_HOME
fi
cargo clippy --all-targets --features cuda -- -D warnings
cargo test --release --features cuda --lib --test suite --no-run
cargo build --release --features cuda
# src/gpu/build.rs leaves what ptxas printed beside what it compiled; other builds may have left theirs.
newest=
for file in "${CARGO_TARGET_DIR:-target}"/release/build/grpo-pipes-*/out/kernels.txt; do
    if [ "$file" -nt "$newest" ]; then newest=$file; fi
done
awk -f tests/cuda/kernels.awk "$newest"
CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90} PATH=$PATH${CUDA_HOME:+:$CUDA_HOME/bin} \
    cargo clippy --release --features candle-cuda -- -D warnings
cargo test --release --features cuda --lib --test suite -- cuda device real_gpu
