#!/usr/bin/env bash
# The whole job: data, a start, an evaluation, GRPO in one pipe, the same evaluation again, an exported model.
# Each part is skipped when its result is there, so the same command goes on where a run stopped.
. "$(dirname "$0")/common.sh"
begin_run
say "run: $RUN (recipe $RECIPE, seed $SEED)"
began=$SECONDS

# The training order.
make_prompts() {
    local per_step=$((PROMPTS_PER_STEP * ${DYNAMIC_SAMPLING:-1})) # dynamic sampling may pass over some
    local wanted=$((STEPS * per_step))
    [ ! -f "$RUN/prompts.jsonl" ] || return 0
    say "prompts: $wanted from $DATA"
    prepare train "$wanted" --shuffle --epochs "$EPOCHS" --steps "$STEPS" --groups-per-step "$per_step" -o "$RUN/prompts.jsonl"
}

# Step 0: a supervised start, or the model as it is. Either way a directory of its own, whose optimizer starts afresh.
make_start() {
    local start=$RUN/checkpoints/step_000000 new=$RUN/checkpoints/.start.tmp model=$MODEL init=
    [ ! -d "$start" ] || return 0
    rm -rf "$new"
    if [ "$SUPERVISED_STEPS" -gt 0 ]; then
        say "supervised start: $SUPERVISED_STEPS steps on $SUPERVISED_BATCH demonstrations each"
        model=$RUN/checkpoints/supervised
        rm -rf "$model"
        [ ! -d "$MODEL" ] || compgen -G "$MODEL/model.safetensors*" >/dev/null || init=--init
        # shellcheck disable=SC2086 # a command and its arguments
        prepare train $((SUPERVISED_STEPS * SUPERVISED_BATCH)) --demonstrations \
            --sloppy-format "$SLOPPY_FORMAT" --sloppy-arithmetic "$SLOPPY_ARITHMETIC" |
            ${TRAINER_RUN:-} grpo-step --supervised --policy "$MODEL" --out "$model" --loss-on-prompt --groups-per-step "$SUPERVISED_BATCH" \
                --learning-rate "$SUPERVISED_LEARNING_RATE" --schedule linear --warmup-ratio 0.02 --total-steps "$SUPERVISED_STEPS" \
                --max-grad-norm 1 --seed "$SEED" ${DTYPE:+--dtype "$DTYPE"} ${OPTIMIZER_STATE:+--optimizer-state "$OPTIMIZER_STATE"} \
                ${CHAT_TEMPLATE_ARG:+--chat-template-arg "$CHAT_TEMPLATE_ARG"} $init >"$RUN/supervised.jsonl"
    fi
    export-hf "$model" "$new" --dtype f32
    # What the model is to be asked with travels with its weights: this run's system prompt, not the one it came with.
    rm -f "$new/system_prompt.txt"
    [ -z "$SYSTEM_PROMPT" ] || cp "$SYSTEM_PROMPT" "$new/system_prompt.txt"
    mv "$new" "$start"
}

# The steps that are left; with EVALUATE_EVERY in stretches, and an evaluation after each.
train_all() {
    local step every=${EVALUATE_EVERY#0}
    while step=$(reached_step) || exit; do
        if [ "$step" -gt 0 ] && [ "$step" -lt "$STEPS" ] && [ $((step % ${every:-$STEPS})) = 0 ]; then
            evaluate_as "$(printf step_%06d "$step")" "$RUN/policy"
        fi
        train_steps ${every:+--steps $((every - step % every))} >/dev/null
        [ "$(reached_step)" -lt "$STEPS" ] || return 0
    done
}

make_all() {
    make_prompts
    make_start
    # What was being made when the run was killed. Checkpoints are the trainer's own to sweep, which knows whether another one is at work.
    find "$RUN" -name '.*.tmp' -type f -delete
    [ -L "$RUN/policy" ] || { rm -rf "$RUN/checkpoints/supervised" && ln -s checkpoints/step_000000 "$RUN/policy"; }
    evaluate_as before "$RUN/policy"
    # Also when all steps are done, and only the export is not: the trainer looks at the policy for damage before it leaves the run.
    [ -d "$RUN/export" ] || train_all
    evaluate_as after "$RUN/policy"
    [ -d "$RUN/export" ] || export-hf "$RUN/policy" "$RUN/export" --metrics "$RUN/metrics.jsonl" --evaluation "$RUN/eval/after.greedy.json"
    evaluate --compare "$RUN"/eval/{before,after}.greedy.json --compare "$RUN"/eval/{before,after}.sampled.json
    say "model: $RUN/export ($((SECONDS - began)) s)"
}

run_as_group make_all
