#!/usr/bin/env bash
# Compiles, lints and links everything with CUDA on a machine without a GPU, says what each kernel takes of a card, and runs the
# tests that such a machine can: what is missing is said in one line, and the CPU does the work.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${NVCC:-}${CUDA_HOME:-}" ] && ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then
    CUDA_HOME=$(bash pipelines/cuda-toolchain.sh)
    export CUDA_HOME
fi
cargo clippy --all-targets --features cuda -- -D warnings
cargo test --release --features cuda --lib --test suite --no-run
# src/gpu/build.rs leaves what ptxas said beside what it compiled.
out=$(cargo build --release --features cuda --message-format=json | sed -n 's/.*"out_dir":"\([^"]*\/grpo-pipes-[^"]*\)".*/\1/p')
awk -f pipelines/kernels.awk "$out/kernels.txt"
cargo test --release --features cuda --lib --test suite -- cuda device real_gpu
