# Sourced by common.sh: the stages of a step, one by one over files or all in one pipe.

# rollout with the lengths this recipe trains with. It takes the place of the shell that calls it, as the other stages of a pipe do, so
# that no shell goes between a stage and what becomes of it.
sample() {
    exec rollout --dtype "$DTYPE" --max-prompt-tokens "$MAX_PROMPT_TOKENS" --max-completion-tokens "$MAX_COMPLETION_TOKENS" --seed "$SEED" "$@"
}

# Step NUMBER, the policy's next, by files. What an interrupted attempt left is made again: the same numbers give the same bytes.
train_one_step() {
    local scored=$RUN/.scored.tmp
    prompts_of_step | sample_groups --model "$RUN/policy" 2>"$RUN/rollout.log" | reward >"$scored" || {
        end_if_wished $?
        cat "$RUN/rollout.log" >&2
        die "step $1: sampling or scoring failed"
    }
    (learn <"$scored")
    rm -f "$scored" "$RUN/.scorer"
}

prompts_of_step() {
    local consumed
    consumed=$(prompts_consumed "$RUN/policy")
    sed -n "$((consumed + 1)),$((consumed + PROMPTS_PER_STEP))p" "$RUN/prompts.jsonl"
}

# How many prompts the weights in a checkpoint were trained on; the start has no state.
prompts_consumed() {
    local consumed=
    [ ! -f "$1/state.json" ] || consumed=$(sed -n 's/.*"prompts_consumed": \([0-9]*\).*/\1/p' "$1/state.json")
    echo "${consumed:-0}"
}

# All steps that are left in one pipe, or those of the first prompts in a FILE: records go forward through it, weights back through
# $RUN/live. Metrics on stdout.
# A shell that waits for a pipe tells of each killed part of it, in several lines: it is given no place to tell it.
train_steps() {
    local codes=
    { sample_as_it_learns "${1:-$RUN/prompts.jsonl}" 2>&4 | reward 2>&4 | learn_from_them 2>&4 || codes=${PIPESTATUS[*]}; } 4>&2 2>/dev/null
    [ -z "$codes" ] || name_the_cause $codes
}

sample_as_it_learns() {
    : >"$RUN/rollout.log"
    {
        sample_groups "$1" --follow "$RUN" --groups-per-step "$PROMPTS_PER_STEP" --max-staleness "$MAX_STALENESS" 2>&1 >&3 |
            keep_log 2>&4
    } 3>&1 4>&2 2>/dev/null
}

# What rollout says goes to its log, and to the terminal when it is not just how far it is. It speaks to the end, whatever the signal.
keep_log() {
    local line
    trap '' INT
    while IFS= read -r line; do
        { echo "$line" >>"$RUN/rollout.log"; } 2>/dev/null || true # a full disk has been told of
        case $line in
        *" tokens/s" | "rollout: done in "* | "rollout: spent "*) ;;
        *) echo "$line" ;;
        esac
    done | leave_out_consequences
}

# The script names the cause itself.
leave_out_consequences() {
    local line
    trap '' INT
    while IFS= read -r line; do
        case $line in
        *"; see what that said" | *": ended by SIG"*) ;;
        *) say "$line" ;;
        esac
    done
}

# A stage of the user's may be far from reading or writing, and so from noticing that the trainer is gone.
learn_from_them() {
    local code=0
    { learn 2>&1 >&3 | leave_out_consequences 2>&4; } 3>&1 4>&2 2>/dev/null || code=$?
    if [ "$code" -ne 0 ] && [ -f "$RUN/.scorer" ]; then
        sleep 1
        kill -KILL "$(cat "$RUN/.scorer")" 2>/dev/null || true
    fi
    rm -f "$RUN/.scorer"
    return "$code"
}

# name_the_cause CODE_OF_ROLLOUT CODE_OF_SCORE CODE_OF_GRPO_STEP
name_the_cause() {
    local name code killed= ended=
    for code in "$@"; do end_if_wished "$code"; done
    for name in rollout "${SCORER:-score}" grpo-step; do
        if [ "$1" -gt 128 ] && [ "$1" -ne 141 ]; then
            killed+=", $name was killed by signal $(($1 - 128))"
        elif [ "$1" -ne 0 ]; then
            ended+=", $name ended with code $1"
        fi
        shift
    done
    [ -z "$killed" ] || ended=$killed # the others went after it; 141 is that of a stage whose reader went
    die "$RUN stopped at step $(reached_step): ${ended#, }; the same command goes on from there"
}

# SIGINT and SIGTERM are wishes, not failures: run_as_group says what there is to say.
end_if_wished() {
    case $1 in 130 | 143) exit "$1" ;; esac
}

sample_groups() {
    sample -n "$NUM_GENERATIONS" --temperature "$TEMPERATURE" --on-long-prompt truncate-left "$@"
}

# A stage of the user's takes the place of score: SCORER='./my_reward.py'.
reward() {
    [ -n "$SCORER" ] || exec score --reward "$REWARDS"
    exec sh -c 'echo $$ >"$0" && exec $1' "$RUN/.scorer" "$SCORER"
}

# The same arguments whether the steps come one by one or all in a row: checkpoints remember them.
learn() {
    local reference=() stale=()
    [ "$BETA" = 0 ] || reference=(--reference "$RUN/checkpoints/$(step_name 0)")
    [ "$MAX_STALENESS" = 0 ] || stale=(--max-staleness "$MAX_STALENESS")
    [ -z "$IMPORTANCE_SAMPLING_CLIP_MAX" ] || stale+=(--importance-sampling-clip-max "$IMPORTANCE_SAMPLING_CLIP_MAX")
    exec grpo-step --follow "$RUN" --groups-per-step "$PROMPTS_PER_STEP" --save-every "$SAVE_EVERY" --keep "$KEEP" --loss "$LOSS" --epsilon "$EPSILON" \
        --beta "$BETA" ${reference[@]+"${reference[@]}"} --max-completion-tokens "$MAX_COMPLETION_TOKENS" \
        --learning-rate "$LEARNING_RATE" --schedule "$SCHEDULE" --warmup-ratio "$WARMUP_RATIO" --total-steps "$STEPS" \
        --adam-beta1 "$ADAM_BETA1" --adam-beta2 "$ADAM_BETA2" --weight-decay "$WEIGHT_DECAY" \
        --optimizer-state "$OPTIMIZER_STATE" --max-grad-norm "$MAX_GRAD_NORM" --dtype "$DTYPE" --seed "$SEED" ${stale[@]+"${stale[@]}"}
}
