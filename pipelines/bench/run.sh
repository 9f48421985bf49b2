#!/usr/bin/env bash
# Speed and memory of the commands, and of PyTorch, transformers, TRL and llama.cpp at the same work in the same run. A Markdown report on stdout.
# PYTHON has the packages of tests/bench/peers/requirements*.txt; a peer that it lacks is left out. LARGE= leaves out the 0.5B shape.
. "$(dirname "$0")/../common.sh"
for part in measure tiny large decode families gguf report; do . "pipelines/bench/$part.sh"; done

PYTHON=${PYTHON:-python3}
THREADS=${THREADS:-2}
REPEATS=${REPEATS:-5}                              # runs of each side, taking turns
LARGE=${LARGE-../shared/qwen2.5-0.5b-instruct}     # directory with config.json and tokenizer; random weights are made
LARGE_REPEATS=${LARGE_REPEATS:-3}
DECODE_REPEATS=${DECODE_REPEATS:-5}                # turns of the decode steps, of which the best sample counts
# All of it on the CPU, where there is a GPU too.
export CUDA_VISIBLE_DEVICES=
export RAYON_NUM_THREADS=$THREADS OMP_NUM_THREADS=$THREADS MKL_NUM_THREADS=$THREADS PYTHONDONTWRITEBYTECODE=1

weights=0
mkdir -p target
WORK=$(mktemp -d target/bench.XXXXXX)
trap 'rm -rf "$WORK"' EXIT
TINY=$WORK/tiny
export SEED=1
begin "$WORK/run" --recipe pipelines/recipes/tiny.env
mkdir "$WORK/samples"
peers=tests/bench/peers
settings="$THREADS:active $THREADS:passive 1:passive"

cp /proc/loadavg "$WORK/load"
versions=$(package_versions torch transformers trl)
llama=$(package_versions llama-cpp-python gguf)
[ -n "$versions" ] || say "$PYTHON lacks the packages of $peers/requirements.txt: they are left out"
[ -n "$llama" ] || say "$PYTHON lacks the packages of $peers/requirements-llama.txt: llama.cpp is left out"
measure_tiny
measure_families
if [ -d "$LARGE" ]; then measure_large; else say "no ${LARGE:-LARGE}: the 0.5B shape is left out"; fi
report
