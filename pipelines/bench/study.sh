#!/usr/bin/env bash
# study.sh study|sweep: trains variants of a recipe (tiny) with each of SEEDS, JOBS runs at once, and ranks them. All runs of a seed go on
# from the baseline's start. Numbers in the environment hold for all. A second call goes on; what is done is in runs/NAME.
#   study: the variants below, or the lines of VARIANTS: name|NUMBER=VALUE|NUMBER=VALUE
#   sweep: every combination of the values in GRID='LEARNING_RATE=6e-5,6e-4 BETA=0,0.04'
. "$(dirname "$0")/../common.sh"
[ "$1" != sweep ] || [ -n "${GRID:-}" ] || die "usage: make sweep GRID='LEARNING_RATE=6e-5,6e-4 BETA=0,0.04' SEEDS='1 2 3'" 2
study=${NAME:-$1} SEEDS=${SEEDS:-1 2 3} JOBS=${JOBS:-2}
export RECIPE=${RECIPE:-tiny} RAYON_NUM_THREADS=${RAYON_NUM_THREADS:-$((($(nproc) + JOBS - 1) / JOBS))}

variants() {
    if [ "$1" = sweep ]; then grid "$GRID"; else echo "${VARIANTS:-$STUDY}"; fi
}

STUDY='correctness-alone|REWARDS=correctness=1
seed-semantics|SCORER=score --semantics seed
scale-batch|SCALE_REWARDS=batch
scale-none|SCALE_REWARDS=none
bnpo|LOSS=bnpo
dr_grpo|LOSS=dr_grpo
dapo|LOSS=dapo
cispo|LOSS=cispo|EPSILON_HIGH=5
sapo|LOSS=sapo
gspo|LOSS=gspo|EPSILON=3e-4|EPSILON_HIGH=4e-4
luspo|LOSS=luspo|EPSILON=3e-4|EPSILON_HIGH=4e-4
kl-k3|BETA=0.04|KL_ESTIMATOR=k3
kl-k3-weighted|BETA=0.04|KL_ESTIMATOR=k3-weighted
learning-rate-0.3|LEARNING_RATE=6e-5
learning-rate-3|LEARNING_RATE=6e-4
lora|LORA_RANK=8|LEARNING_RATE=2e-3
generations-4|NUM_GENERATIONS=4
generations-8|NUM_GENERATIONS=8
placebo|SCORER=score --placebo 1'

grid() {
    local number value line lines=('') next
    for number in $1; do
        next=()
        for line in "${lines[@]}"; do
            for value in $(tr , ' ' <<<"${number#*=}"); do next+=("$line|${number%%=*}=$value"); done
        done
        lines=("${next[@]}")
    done
    for line in "${lines[@]}"; do line=${line#|} && echo "${line//|/+}|$line"; done
}

# train_variant NAME SEED NUMBER=VALUE...: takes the place of the shell, so that a signal reaches the run.
train_variant() {
    local name=$study/$1-$2 numbers=(SEED="$2" "${@:3}")
    if [ ! -d "runs/$name" ] && [ "$1" != baseline ]; then
        env "${numbers[@]}" RUN="$study/baseline-$2" FROM=step_000000 NAME="$name" bash pipelines/fork.sh
    fi
    exec env "${numbers[@]}" NAME="$name" bash pipelines/train.sh
}

# begin_variant LINE: its runs that are not done, JOBS at once.
begin_variant() {
    local fields seed run
    IFS='|' read -ra fields <<<"$1"
    for seed in $SEEDS; do
        run=runs/$study/${fields[0]}-$seed
        runs+=("$run")
        [ ! -f "$run/eval/after.sampled.json" ] || continue
        while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do sleep 1; done
        say "$run: ${fields[*]:1}"
        train_variant "${fields[0]}" "$seed" "${fields[@]:1}" >"$run.log" 2>&1 &
    done
}

runs=()
mkdir -p "runs/$study"
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 130' INT TERM HUP
begin_variant baseline
wait
while IFS= read -r line; do begin_variant "$line"; done < <(variants "$1")
wait
for run in "${runs[@]}"; do
    [ -f "$run/eval/after.sampled.json" ] || die "$run did not end: $(tail -n 1 "$run.log"); the same command goes on from there"
done
evaluate --study "${runs[@]}"
