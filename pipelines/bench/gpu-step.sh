# shellcheck shell=bash
# Sourced by gpu.sh: a whole GRPO step of the 0.5B shape against TRL's without vLLM, and the memory of grpo-step.

LEARN_ONCE=${LEARN_ONCE-plain lean leanest lora} # ways to train beside a reference model, of which the memory of a step is measured, each for about 15 s
TRL_TIMES=${TRL_TIMES:-8}                   # steps of TRL's that count
TRL_SECONDS=${TRL_SECONDS:-300}             # that they may take

# with_memory NAME COMMAND...: runs it, and leaves in $WORK/NAME.memory how much more of the card's memory was taken meanwhile [MiB].
with_memory() {
    local name=$1 watcher code=0
    shift
    nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -lms 100 >"$WORK/$name.used" 2>/dev/null &
    watcher=$!
    sleep 1
    "$@" || code=$?
    kill "$watcher" 2>/dev/null || true
    wait "$watcher" 2>/dev/null || true
    awk 'NR == 1 { least = $1 } $1 < least { least = $1 } $1 > most { most = $1 } END { if (NR) printf "%.0f", most - least }' \
        "$WORK/$name.used" >"$WORK/$name.memory"
    return "$code"
}

ratio() { echo "$(calculate "$1 / $2")x"; }

memory() { [ -s "$WORK/$1.memory" ] && calculate "$(cat "$WORK/$1.memory") / 1024" || echo "not measured"; }

# A run in $WORK whose rewards are made up, of 10 steps.
start_steps() {
    export SEED=1 MODEL=$WORK/model DATA=generate STEPS=10 SAVE_EVERY=10 BETA=0
    export MAX_COMPLETION_TOKENS=$NEW_TOKENS SCORER='perl pipelines/bench/made-up-rewards.pl'
    begin "$WORK/run" --recipe pipelines/recipes/qwen2.5-0.5b.env
    prepare train $((STEPS * PROMPTS_PER_STEP)) -o "$RUN/prompts.jsonl"
    export-hf "$MODEL" "$RUN/checkpoints/step_000000" --dtype f32
    back_to_start
}

# Leaves in $WORK/trl what it knew last: it tells after each step, and may fail or be stopped later.
trl_steps() {
    timeout -k 5 "$TRL_SECONDS" "$PYTHON" "$peers/trl_step.py" "$RUN/checkpoints/step_000000" "$RUN/prompts.jsonl" --times "$TRL_TIMES" \
        --prompts-per-step "$PROMPTS_PER_STEP" --generations "$NUM_GENERATIONS" --new-tokens "$MAX_COMPLETION_TOKENS" \
        --learning-rate "$LEARNING_RATE" 2>"$WORK/stderr" | tail -n 1 >"$WORK/trl" || tail -n 3 "$WORK/stderr" >&2
}

# learn_once NAME ARGUMENT...: the memory of one step on the rollouts of the run's first one, with a reference model.
learn_once() {
    local name=$1
    shift
    rm -rf "$WORK/trained"
    if with_memory "$name" grpo-step "$RUN/rollouts/step_000001.jsonl.zst" --policy "$RUN/checkpoints/step_000000" --out "$WORK/trained" \
        --reference "$RUN/checkpoints/step_000000" --beta 0.04 "$@" >/dev/null 2>"$WORK/stderr"; then
        echo "| grpo-step $* | $(memory "$name") | $(sed -n 's/.*memory: //p' "$WORK/stderr" | head -n 1) |"
    else
        echo "| grpo-step $* | failed | $(tail -n 1 "$WORK/stderr") |"
    fi
}

part_step() {
    local ours lengths
    [ -d "$WORK/model" ] || return 0
    mkdir -p "$WORK/samples"
    start_steps
    cat <<END

## A whole GRPO step against TRL's

Shape of Qwen2.5-0.5B, random weights, bf16, $PROMPTS_PER_STEP prompts x $NUM_GENERATIONS completions of $NEW_TOKENS tokens, no reference model: sampled, scored, trained.
Medians of the steps after the first two. Memory is what the card had taken at most meanwhile, all processes, more than before.
END
    with_memory ours time_steps step
    ours=$(median step)
    lengths=$(sed -n 's/.*"completions\/mean_length":\([0-9.]*\).*/\1/p' "$RUN/metrics.jsonl" | tail -n 1)
    cat <<END
Ours: $(split_line 8)

| | s a step | memory [GiB] | mean completion [tokens] |
|---|---|---|---|
| rollout, made-up rewards and grpo-step in one pipe | $ours | $(memory ours) | $lengths |
END
    their_rows "$ours"
    [ -z "$LEARN_ONCE" ] || learn_rows
}

# their_rows OURS: TRL's step, and how many of ours it takes.
their_rows() {
    local theirs='' lengths=''
    if "$PYTHON" -c 'import trl' 2>/dev/null; then with_memory trl trl_steps; fi
    [ ! -s "$WORK/trl" ] || read -r theirs lengths <"$WORK/trl"
    echo "| TRL, no vLLM | ${theirs:-not measured} | $(memory trl) | $lengths |"
    [ ! -s "$WORK/trl.memory" ] || [ -z "$theirs" ] || echo "| TRL against ours | $(ratio "$theirs" "$1") | $(ratio "$(cat "$WORK/trl.memory")" "$(cat "$WORK/ours.memory")") | |"
}

learn_rows() {
    local way
    printf '\n| with a reference model | memory [GiB] | its plan |\n|---|---|---|\n'
    for way in $LEARN_ONCE; do
        case $way in
        plain) learn_once plain ;;
        lean) learn_once lean --memory-limit 11GiB ;;
        leanest) learn_once leanest --memory-limit 7GiB --optimizer-state bf16 ;;
        lora) learn_once lora --lora-rank 16 ;;
        *) echo "| $way: not plain, lean, leanest or lora | | |" ;;
        esac
    done
}
