#!/usr/bin/env bash
# The whole job: data, a start, an evaluation, GRPO in one pipe, the same evaluation again, an exported model.
# Each part is skipped when its result is there, so the same command goes on where a run stopped.
. "$(dirname "$0")/common.sh"
choose_recipe
load_recipe
pin_recipe
say "run: $RUN (recipe $RECIPE, seed $SEED)"
began=$SECONDS

# The training order. An epoch gives whole steps only: the last few of its rows would share a step with the next epoch's, where
# the same problem could come twice.
make_prompts() {
    [ ! -f "$RUN/prompts.jsonl" ] || return 0
    local wanted=$((STEPS * PROMPTS_PER_STEP)) epoch usable
    say "prompts: $wanted from $DATA"
    prepare train "$wanted" --shuffle --epochs "$EPOCHS" -o "$RUN/.prompts.jsonl"
    epoch=$(($(wc -l <"$RUN/.prompts.jsonl") / EPOCHS))
    usable=$((epoch - epoch % PROMPTS_PER_STEP))
    [ $((usable * EPOCHS)) -ge "$wanted" ] ||
        die "$EPOCHS epochs of $epoch problems are $((usable / PROMPTS_PER_STEP * EPOCHS)) steps; set EPOCHS or STEPS" 2
    awk -v epoch="$epoch" -v usable="$usable" -v wanted="$wanted" \
        '(NR - 1) % epoch < usable && written < wanted { print; written++ }' "$RUN/.prompts.jsonl" >"$RUN/.ordered.jsonl"
    rm "$RUN/.prompts.jsonl"
    sync "$RUN/.ordered.jsonl" # before its name says that it is whole
    mv "$RUN/.ordered.jsonl" "$RUN/prompts.jsonl"
}

# Step 0: a supervised start, or the model as it is. Either way a directory of its own, whose optimizer starts afresh.
make_start() {
    local start model=$MODEL init=()
    start=$RUN/checkpoints/$(step_name 0)
    [ ! -d "$start" ] || return 0
    if [ "$SUPERVISED_STEPS" -gt 0 ]; then
        say "supervised start: $SUPERVISED_STEPS steps on $SUPERVISED_BATCH demonstrations each"
        model=$RUN/checkpoints/supervised
        rm -rf "$model"
        [ -f "$MODEL/model.safetensors" ] || [ -f "$MODEL/model.safetensors.index.json" ] || init=(--init)
        prepare train $((SUPERVISED_STEPS * SUPERVISED_BATCH)) --demonstrations \
            --sloppy-format "$SLOPPY_FORMAT" --sloppy-arithmetic "$SLOPPY_ARITHMETIC" |
            grpo-step --supervised ${init[@]+"${init[@]}"} --policy "$MODEL" --out "$model" --loss-on-prompt \
                --groups-per-step "$SUPERVISED_BATCH" --learning-rate "$SUPERVISED_LEARNING_RATE" \
                --schedule linear --warmup-ratio 0.02 --total-steps "$SUPERVISED_STEPS" --max-grad-norm 1 \
                --dtype "$DTYPE" --optimizer-state "$OPTIMIZER_STATE" --seed "$SEED" >"$RUN/supervised.jsonl"
    fi
    export-hf "$model" "$start" --dtype f32
}

# What the model is to be asked with travels with its weights: this run's system prompt, not the one it came with.
keep_system_prompt() {
    local kept
    kept=$RUN/checkpoints/$(step_name 0)/system_prompt.txt
    if [ -z "$SYSTEM_PROMPT" ]; then
        rm -f "$kept"
    elif ! cmp -s "$SYSTEM_PROMPT" "$kept"; then
        cp "$SYSTEM_PROMPT" "$RUN/.system_prompt"
        mv "$RUN/.system_prompt" "$kept"
    fi
}

# What only served to make something else, or was being made when the run was killed. Checkpoints are the trainer's own to sweep,
# which knows whether another one is at work.
sweep() {
    [ -L "$RUN/policy" ] || rm -rf "$RUN"/checkpoints/supervised "$RUN"/checkpoints/.*.tmp
    find "$RUN" -name '.*.tmp' -type f -delete
}

evaluate_as() {
    [ -f "$RUN/eval/$1.sampled.json" ] || say "evaluation $1: $TEST_PROMPTS held-out problems"
    [ -f "$RUN/eval/$1.sampled.json" ] || bash pipelines/evaluate.sh "$RUN/policy" "$RUN/eval/$1"
}

# Also when all steps are done, and only the export is not: the trainer looks at the policy for damage before it leaves the run.
train() {
    [ "$(reached_step)" -eq "$STEPS" ] && [ -d "$RUN/export" ] || train_steps | tell_progress
}

# Of the metrics on stdin each tenth step is told.
tell_progress() {
    local line step=0
    trap '' INT # the trainer's last line comes after it
    while IFS= read -r line; do
        [[ $line =~ \"policy_step\":([0-9]+) ]] && step=${BASH_REMATCH[1]}
        if [ $((step % 10)) -eq 0 ] || [ "$step" -eq "$STEPS" ]; then
            say "step $step/$STEPS: $(pick reward kl entropy completions/mean_length <<<"$line")($((SECONDS - began)) s)"
        fi
    done
}

# The named numbers that a line of JSON has.
pick() {
    local line name value
    read -r line
    for name in "$@"; do
        value=$(number "$name" <<<"$line")
        [ -z "$value" ] || printf '%s %.3f  ' "$name" "$value"
    done
}

# The first number after "NAME": in the JSON on stdin, through an object's "value" if there is one.
number() {
    sed -n 's|.*"'"$1"'":\({"value":\)\{0,1\}\(-\{0,1\}[0-9][0-9.e-]*\).*|\2|p' | cut -c 1-8
}

compare() {
    evaluate --compare "$RUN"/eval/{before,after}.greedy.json --compare "$RUN"/eval/{before,after}.sampled.json
}

make_all() {
    make_prompts
    make_start
    keep_system_prompt
    sweep
    [ -L "$RUN/policy" ] || point_policy_at "$(step_name 0)"
    evaluate_as before
    train
    evaluate_as after
    [ -d "$RUN/export" ] || export-hf "$RUN/policy" "$RUN/export" --metrics "$RUN/metrics.jsonl" --evaluation "$RUN/eval/after.greedy.json"
    compare
    say "model: $RUN/export ($((SECONDS - began)) s)"
}

run_as_group make_all
