# shellcheck shell=bash
# Sourced by run.sh: the tiny shape.

# Whole steps from the same start against TRL's: in one pipe, from one line of metrics to the next, and by files, three processes
# each. The first two of ten do not count.
whole_step() {
    local step began
    back_to_start
    for step in {1..10}; do
        began=$EPOCHREALTIME
        step_by_files
        [ "$step" -le 2 ] || calculate "$EPOCHREALTIME - $began"
    done >"$WORK/samples/of_run"
    note by_files "$(median of_run)"
    back_to_start
    time_steps of_run
    note whole "$(median of_run)"
    sed -n 's/.*"completions\/mean_length":\([0-9.]*\).*/\1/p' "$RUN/metrics.jsonl" | tail -n 8 |
        awk '{ sum += $1 } END { print sum / NR }' >>"$WORK/samples/whole.length"
    peer whole.peer trl_step "$RUN/checkpoints/step_000000" "$RUN/prompts.jsonl" --prompts-per-step "$PROMPTS_PER_STEP" \
        --generations "$NUM_GENERATIONS" --new-tokens "$MAX_COMPLETION_TOKENS" --learning-rate "$LEARNING_RATE"
    [ -z "$versions" ] || cut -d ' ' -f 2 "$WORK/output" | tail -n 1 >>"$WORK/samples/whole.peer.length"
}

step_by_files() {
    sample_steps --steps 1 | reward >"$WORK/scored_of_step"
    (learn <"$WORK/scored_of_step") >"$WORK/output"
}

# A start that knows the format more or less, so that groups have different rewards.
start_run() {
    prepare train $((10 * PROMPTS_PER_STEP)) -o "$RUN/prompts.jsonl"
    prepare train $((400 * SUPERVISED_BATCH)) --demonstrations --sloppy-format "$SLOPPY_FORMAT" --sloppy-arithmetic "$SLOPPY_ARITHMETIC" |
        grpo-step --supervised --init --policy "$MODEL" --out "$RUN/supervised" --loss-on-prompt --seed 1 \
            --groups-per-step "$SUPERVISED_BATCH" --learning-rate "$SUPERVISED_LEARNING_RATE" >"$RUN/supervised.jsonl"
    export-hf "$RUN/supervised" "$RUN/checkpoints/step_000000" --dtype f32
}

scoring() {
    output=/dev/null run score "$WORK/rollouts.jsonl"
    note score "$(calculate "$(wc -l <"$WORK/rollouts.jsonl") / $taken")"
    note score.peak "${peak:-0}"
    peer score.peer score "$WORK/some_rollouts.jsonl"
}

measure_tiny() {
    say "tiny shape: making what is measured on"
    random_model "$MODEL" "$TINY"
    prepare train 256 -o "$TINY.prompts"
    head -n 120 "$TINY.prompts" | rollout --model "$TINY" -n 16 --max-completion-tokens 48 2>/dev/null | made_up_rewards >"$TINY.scored"
    start_run
    head -n 64 "$TINY.prompts" | rollout --model "$RUN/checkpoints/step_000000" -n 16 --max-completion-tokens 48 \
        >"$WORK/some_rollouts.jsonl" 2>/dev/null
    for _ in {1..400}; do cat "$WORK/some_rollouts.jsonl"; done >"$WORK/rollouts.jsonl"
    for ((i = 1; i <= REPEATS; i++)); do
        say "tiny shape: $i of $REPEATS"
        sampling tiny_sampling "$TINY" 4 16 48 64
        training tiny_training "$TINY" 4 30 8
        whole_step
        scoring
    done
    rm "$WORK/rollouts.jsonl"
}
