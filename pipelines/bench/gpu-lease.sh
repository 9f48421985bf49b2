#!/usr/bin/env bash
# A card that is lent for minutes, on a machine without cargo: everything is built here, and checked and measured there.
#
#   bash pipelines/bench/gpu-lease.sh pack        here: binaries, model, a CPU's results and wheels into target/gpu-lease, below 60 MiB
#   bash pipelines/bench/gpu-lease.sh check       there, in a copy of this tree with target/gpu-lease: every test, then the first numbers
#   bash pipelines/bench/gpu-lease.sh measure     there: the tests again, all numbers, transformers and TRL in the same run
#
# Nothing of it is needed where there are a card, cargo and time: `make CUDA=1 test-gpu bench-gpu`. Each part has its own limit [s], none goes
# on beyond END [s] after the start, and a failure ends its part alone. What is said and measured lies under OUT, written as it comes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. pipelines/bench/measure.sh # random_model, made_up_rewards
LEASE=$PWD/target/gpu-lease
ARCHS=${CUDA_ARCHS:-90}
COMMANDS=(gsm8k-prep rollout score grpo-step evaluate export-hf)
MODEL_FILES=${MODEL:-../shared/qwen2.5-0.5b-instruct} # config and tokenizer; weights are random

# ---- here -------------------------------------------------------------------------------------------------------------------------

pack() {
    local home suite
    home=${CUDA_HOME:-$(bash tests/cuda/toolchain.sh)}
    export CUDA_HOME=$home CUDA_ARCHS=$ARCHS
    suite=$(cargo test --release --features cuda --test suite --no-run --message-format=json |
        sed -n 's/.*"executable":"\([^"]*suite-[^"]*\)".*/\1/p' | tail -n 1)
    cargo build --release --features cuda --bins --example bench-gpu
    mkdir -p "$LEASE/bin"
    pwd >"$LEASE/here"
    for name in "${COMMANDS[@]}"; do strip -o "$LEASE/bin/$name" "target/release/$name"; done
    strip -o "$LEASE/bin/bench-gpu" target/release/examples/bench-gpu
    strip -o "$LEASE/bin/suite" "$suite"
    git describe --always --dirty >"$LEASE/commit" 2>/dev/null || echo unknown >"$LEASE/commit"
    [ -d "$LEASE/model" ] || cp -r "$MODEL_FILES" "$LEASE/model"
    [ -d "$LEASE/cpu" ] || cpu_results
    [ -d "$LEASE/wheels" ] || wheels
    tar -cJf "$LEASE/bin.tar.xz" -C "$LEASE" bin
    rm -r "${LEASE:?}/bin"
    du -sh "$LEASE"
}

# 64 completions of 4 prompts with their rewards, and the metrics of a step on them, in f32 on the CPU: what a card is compared with.
cpu_results() {
    local work
    work=$(mktemp -d)
    PATH=$PWD/target/release:$PATH
    random_model "$LEASE/model" "$work/model"
    gsm8k-prep --generate 64 --seed 1 >"$work/prompts.jsonl"
    head -n 4 "$work/prompts.jsonl" | rollout --model "$work/model" --device cpu -n 16 --max-completion-tokens 24 --seed 1 |
        made_up_rewards >"$work/scored.jsonl"
    mkdir "$LEASE/cpu.new"
    grpo-step "$work/scored.jsonl" --policy "$work/model" --device cpu --dry-run >"$LEASE/cpu.new/metrics.jsonl"
    mv "$work/scored.jsonl" "$LEASE/cpu.new"
    mv "$LEASE/cpu.new" "$LEASE/cpu"
    rm -r "$work"
}

# TRL and what it needs beyond torch and transformers, for Python 3.12.
wheels() {
    "${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi none \
        --dest "$LEASE/wheels" trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19
}

# ---- there ------------------------------------------------------------------------------------------------------------------------

left() { echo $((END - SECONDS)); }

# part NAME MOST FUNCTION ARGUMENT...: at most so many seconds, and never beyond the end; what comes after it goes on whatever it does.
part() {
    local name=$1 most=$2 code=0 began=$SECONDS
    shift 2
    if [ "$(left)" -lt 6 ]; then
        echo "== $name: no time"
        return
    fi
    [ "$most" -lt "$(left)" ] || most=$(left)
    timeout -k 5 "$most" bash "$0" part "$@" || code=$?
    echo "== $name: code $code after $((SECONDS - began)) s, $(left) s left"
}

# The tree must be found where it was built: paths of fixtures and commands are in the tests.
unpack() {
    local here
    here=$(cat "$LEASE/here")
    if [ "$PWD" != "$here" ] && [ ! -e "$here" ]; then
        mkdir -p "$(dirname "$here")"
        ln -s "$PWD" "$here"
    fi
    mkdir -p target/release/examples "$WORK"
    "$PYTHON" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' "$LEASE/bin.tar.xz" "$LEASE"
    mv "$LEASE"/bin/bench-gpu target/release/examples/
    mv "$LEASE"/bin/* target/release/
}

there() {
    export OUT=${OUT:-$LEASE/out} WORK=${WORK:-/tmp/gpu-lease} PYTHON=${PYTHON:-python3} END RUST_BACKTRACE=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=8
    export PATH=$PWD/target/release:$PATH SUITE=$PWD/target/release/suite PEER_DEVICE=cuda
    mkdir -p "$OUT" "$WORK"
    : >"$WORK/tests"
    exec > >(tee -a "$OUT/log.txt") 2>&1
    # Where a Python environment has cuBLASLt.
    [ -n "${VIRTUAL_ENV:-}" ] || ! command -v "$PYTHON" >/dev/null || VIRTUAL_ENV=$("$PYTHON" -c 'import sys; print(sys.prefix)')
    export VIRTUAL_ENV
    unpack
    COMMIT=$(cat "$LEASE/commit")
    export COMMIT
    echo "commit $COMMIT, $(date -u +%FT%TZ)"
}

check() {
    END=${END:-430}
    there
    part machine 15 machine
    every_test
    part handover 40 one_test gpu::handover::a_run_on_a_real_gpu_copies_weights_within_it
    part model 25 model
    part reference 40 reference
    part sampling 60 bench decode generate prefill kernels
    part training 60 bench train adamw handover train-kernels
    part step 60 whole_step
    part requests 30 bench invariant requests
    part sanitizer 60 sanitizer
    part profile 50 profile
    verdict
}

measure() {
    END=${END:-300}
    there
    every_test
    part model 25 model
    part sampling 40 bench decode generate prefill
    part training 40 bench train adamw handover
    part step 60 whole_step
    part requests 30 bench invariant requests
    part kernels 30 bench kernels=64,512,1 train-kernels
    part generate 75 in_time 70 generate --prompts 4 --generations 16 --new-tokens 200 --times 1
    part trl 120 trl
    part profile 60 profile
    part learn 120 learn
    part batched 55 in_time 50 generate_batch --prompts 4 --generations 16 --new-tokens 200 --times 1
    verdict
}

machine() {
    nvidia-smi
    nvidia-smi -q -d CLOCK | grep -A 3 'Max Clocks' || true
    ldconfig -p | grep -E 'libcuda.so|cublasLt' || true
    find "$VIRTUAL_ENV"/lib/*/site-packages/nvidia -iname '*cublaslt*' 2>/dev/null || true
    df -h /dev/shm . || true
    grep -m 1 'model name' /proc/cpuinfo
    nproc
    ldd --version | head -n 1
    "$PYTHON" -m pip list 2>/dev/null | grep -iE '^(torch|transformers|pyarrow|datasets|trl|pandas|accelerate) ' || true
}

# Those that look at the card's memory, or take all of it, by themselves; then those that failed once more, for what they do wrong.
every_test() {
    names >"$WORK/names"
    grep -E 'gpu::driver|ten_thousand' "$WORK/names" >"$WORK/alone" || true
    grep -vE 'gpu::driver|ten_thousand' "$WORK/names" >"$WORK/kernels" || true
    part alone 50 tests "$WORK/alone" 1
    part kernels 90 tests "$WORK/kernels" 4
    sed -n 's/^[1-9][0-9]* \(.*\) .* s$/memcheck \1/p' "$WORK/tests" >"$WORK/failed"
    part failed 40 sanitized "$WORK/failed" 1
}

names() { "$SUITE" gpu:: --ignored --list --format=terse | sed -n 's/: test$//p'; }

# tests FILE AT_ONCE: each a process of its own, because after a bad access nothing works in that process.
tests() { xargs -r -a "$1" -I{} -P "$2" bash "$0" part one_test {}; }

one_test() {
    local code=0 began=$EPOCHREALTIME said=$WORK/said.${1//:/_}
    # Numbers of the environment would be taken for a recipe's.
    env -u MODEL timeout 60 "$SUITE" --exact "$1" --include-ignored --nocapture >"$said" 2>&1 || code=$?
    echo "$code $1 $(awk "BEGIN { printf \"%.1f\", $EPOCHREALTIME - $began }") s" | tee -a "$WORK/tests"
    [ "$code" = 0 ] || { echo "--- $1" && grep -v 'stack backtrace' "$said" | head -c 3000 || true; }
    return "$code"
}

model() {
    random_model "$LEASE/model" "$WORK/model"
    gsm8k-prep --generate 64 --seed 1 >"$WORK/prompts.jsonl"
    ls -l "$WORK/model"
}

# The card against the CPU at the shape of the 0.5B model: metrics of a step on the CPU's records (the difference of log-probabilities
# among them), then a rollout of its own and a step on that.
reference() {
    local scored=$LEASE/cpu/scored.jsonl dtype
    echo "cpu, f32: $(cat "$LEASE/cpu/metrics.jsonl")"
    for dtype in f32 bf16; do
        echo "card, $dtype: $(grpo-step "$scored" --policy "$WORK/model" --device cuda --dtype $dtype --dry-run --max-staleness any --logprob-band 1)"
    done
    head -n 4 "$WORK/prompts.jsonl" | rollout --model "$WORK/model" --device cuda --dtype bf16 -n 16 --max-completion-tokens 150 --seed 1 |
        made_up_rewards >"$WORK/scored.jsonl"
    wc -l "$WORK/scored.jsonl"
    echo "own records, bf16: $(grpo-step "$WORK/scored.jsonl" --policy "$WORK/model" --device cuda --out "$WORK/next" --weights-only)"
    rm -rf "$WORK/next"
    head -n 4 "$WORK/prompts.jsonl" | rollout --model "$WORK/model" --device cuda --dtype f32 -n 16 --max-completion-tokens 24 --seed 1 >"$WORK/f32.jsonl"
    echo "completions in f32 that are the CPU's: $(same_completions "$scored" "$WORK/f32.jsonl")"
}

# Of the records of two files, how many have the same tokens.
same_completions() {
    local tokens='s/.*"completion_token_ids":\(\[[^]]*\]\).*/\1/p'
    paste -d ' ' <(sed -n "$tokens" "$1") <(sed -n "$tokens" "$2") | awk '{ same += $1 == $2 } END { print same + 0 " of " NR }'
}

bench() { or_why "$WORK/bench.err" target/release/examples/bench-gpu "$@"; }

whole_step() {
    export MODEL=$LEASE/model PYTHON=/bin/false PARTS=step LEARN_ONCE=${LEARN_ONCE-}
    or_why "$WORK/step.err" bash pipelines/bench/gpu.sh
}

# A model that learns from nothing, as far as there is time.
learn() {
    export PYTHON=/bin/false PARTS=learn
    or_why "$WORK/learn.err" bash pipelines/bench/gpu.sh
}

# or_why FILE COMMAND...: what it says of its failure is kept in FILE, and its end shown.
or_why() {
    local code=0
    "${@:2}" 2>"$1" || code=$?
    [ "$code" = 0 ] || tail -n 8 "$1"
    return "$code"
}

# Bad accesses and missing barriers, which no result shows; the attention of a decode step, which only whole completions run, and that of
# training come first.
sanitizer() {
    local tool of
    for of in completions_do_not attention draw rows_on norm; do
        for tool in memcheck racecheck; do grep "$of" "$WORK/names" | sed "s/^/$tool /"; done
    done >"$WORK/sanitizer"
    sanitized "$WORK/sanitizer" 6
}

# sanitized FILE AT_ONCE: lines of a tool and a test.
sanitized() { xargs -r -a "$1" -L 1 -P "$2" bash "$0" part one_sanitized; }

# A line for a test without errors, too.
one_sanitized() {
    local code=0 said=$WORK/$1.${2//:/_}
    env -u MODEL timeout 40 compute-sanitizer --tool "$1" --error-exitcode 9 "$SUITE" --exact "$2" --include-ignored >"$said" 2>&1 || code=$?
    echo "$1 $2: code $code, $(tail -n 1 "$said")"
    [ "$code" = 0 ] || grep -m 12 '=====' "$said" || true
    return "$code"
}

# Where the time of a decode step and of a training pass goes, kernel by kernel, and what two of them wait for.
profile() {
    local quick=(--clock-control none --csv --metrics gpu__time_duration.sum)
    ncu "${quick[@]}" --graph-profiling node --launch-skip 700 --launch-count 180 target/release/examples/bench-gpu decode=64 >"$OUT/decode.csv" 2>&1 ||
        tail -n 3 "$OUT/decode.csv"
    ncu "${quick[@]}" --launch-skip 1200 --launch-count 1300 target/release/examples/bench-gpu train=once >"$OUT/train.csv" 2>&1 ||
        tail -n 3 "$OUT/train.csv"
    ncu --clock-control none --graph-profiling node --section SpeedOfLight --section WarpStateStats --section MemoryWorkloadAnalysis \
        --section SchedulerStats -k 'regex:swiglu_rows|decode_attention' --launch-skip 100 --launch-count 3 \
        target/release/examples/bench-gpu decode=64 >"$OUT/why.txt" 2>&1 || tail -n 3 "$OUT/why.txt"
    wc -l "$OUT"/*.csv
}

# in_time SECONDS SCRIPT ARGUMENT...: a peer's number. It tells it after each run, so that the last one before its time is up is left.
in_time() {
    local code=0
    timeout -k 5 "$1" "$PYTHON" "tests/bench/peers/$2.py" "$WORK/model" "$WORK/prompts.jsonl" "${@:3}" >"$WORK/peer" 2>&1 || code=$?
    tail -n 6 "$WORK/peer"
    return "$code"
}

trl() {
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$WORK/site" "$LEASE"/wheels/*.whl
    PYTHONPATH=$WORK/site in_time 110 trl_step --prompts-per-step 4 --generations 16 --new-tokens 150 --learning-rate 5e-6 --times 3 --warm-up 1
}

verdict() {
    echo "tests: $(grep -c '^0 ' "$WORK/tests" || true) passed"
    grep -E '^[1-9][0-9]* gpu' "$WORK/tests" || echo "no test failed"
}

case ${1:-} in
pack | check | measure) "$1" ;;
part) "${@:2}" ;;
*) sed -n '2,7s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
