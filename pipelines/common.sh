# shellcheck shell=bash
# Sourced by the scripts beside it: a run and its recipe, the pipe that trains it, and how both end.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/target/release:$PATH"

say() { echo "$*" >&2; }
die() { say "error: $1" && exit "${2:-1}"; }

# Begins the run of this RECIPE, SEED and NAME, or goes on with it.
begin_run() {
    RECIPE=${RECIPE:-auto}
    if grep -qs '^FORK=' "runs/${NAME:-}/recipe.env"; then
        RECIPE="of $NAME" # which is in no other place
    elif [ "$RECIPE" = auto ]; then
        choose_recipe
    fi
    NAME=${NAME:-$RECIPE-${SEED:-1}}
    begin "runs/$NAME" "pipelines/recipes/$RECIPE.env"
}

# `auto` is the reference job where it can run fast, else the recipe that runs everywhere.
choose_recipe() {
    local why="GPU and nvcc found"
    RECIPE=qwen2.5-0.5b
    command -v nvcc >/dev/null || RECIPE=tiny why="there is a GPU, but no nvcc to build for it"
    nvidia-smi >/dev/null 2>&1 || RECIPE=tiny why="no NVIDIA GPU found"
    say "recipe: $RECIPE ($why)"
}

# begin RUN RECIPE: makes the run's directory, and sets the numbers of its recipe as variables.
begin() {
    local numbers
    RUN=$1
    numbers=$(grpo-step --begin "$1" --recipe "$2") || exit
    set_all "$numbers"
}

# Sets variables from lines NAME=VALUE of grpo-step, which has checked the names. The values are data: nothing evaluates them.
set_all() {
    local line
    while IFS= read -r line; do
        [ -z "$line" ] || printf -v "${line%%=*}" %s "${line#*=}"
    done <<<"$1"
}

reached_step() {
    local STEP=0
    [ ! -L "$RUN/policy" ] || set_all "$(grpo-step --status "$RUN")"
    echo "$STEP"
}

# gsm8k-prep on this recipe's data: at most COUNT problems of SPLIT.
prepare() {
    local split=$1 count=$2
    shift 2
    set -- --split "$split" --seed "$SEED" "$@"
    [ -z "$SYSTEM_PROMPT" ] || set -- --system-prompt "$SYSTEM_PROMPT" "$@"
    case $DATA in
    generate) gsm8k-prep --generate "$count" --max-number "$MAX_NUMBER" "$@" ;;
    *) gsm8k-prep "$DATA" --limit "$count" "$@" ;;
    esac
}

# Runs a function of this script as a process group of its own, and ends with its code. What ends the script ends the group: a signal
# comes to it as SIGINT, which no shell obeys before the commands it waits for. Nothing of the group outlives the script.
run_as_group() {
    local group code=0 signal=''
    set -m
    {
        set +m
        trap '' TERM # also if the whole session gets it
        {
            while kill -0 $$ 2>/dev/null; do sleep 0.5; done
            kill -KILL 0
        } </dev/null >/dev/null 2>&1 &
        "$@"
    } &
    group=$!
    set +m
    trap 'signal=129; kill -INT -- -$group' HUP
    trap 'signal=130; kill -INT -- -$group' INT
    trap 'signal=143; kill -INT -- -$group' TERM
    trap 'kill -STOP -- -$group; kill -STOP $$; kill -CONT -- -$group' TSTP
    while kill -0 "$group" 2>/dev/null; do # a signal ends `wait`, but not yet the group
        wait "$group" && code=0 || code=$?
    done
    kill -KILL -- "-$group" 2>/dev/null || true
    code=${signal:-$code}
    [ "$code" -le 128 ] || say "$RUN was ended by signal $((code - 128)) at step $(reached_step); the same command goes on from there"
    exit "$code"
}

# The steps that are left in one pipe: records go forward through it, weights back through $RUN/live. Metrics on stdout. Arguments are
# rollout's. Bash reports each killed part of a pipe in several lines: silence that.
train_steps() {
    local codes=()
    { sample_steps "$@" 2>&3 | reward 2>&3 | learn_and_end || codes=("${PIPESTATUS[@]}"); } 3>&2 2>/dev/null
    [ ${#codes[@]} -eq 0 ] || name_the_cause "${codes[@]}"
}

# name_the_cause CODE_OF_ROLLOUT CODE_OF_SCORE CODE_OF_GRPO_STEP
name_the_cause() {
    local name killed='' ended=''
    case " $* " in *" 130 "*) exit 130 ;; *" 143 "*) exit 143 ;; esac # run_as_group says what there is to say
    for name in rollout "${SCORER:-score}" grpo-step; do
        case $1 in
        0 | 5 | 141) ;; # ended after another stage did
        1[3-9]? | 129) killed+=", $name was killed by signal $(($1 - 128))" ;;
        *) ended+=", $name ended with code $1" ;;
        esac
        shift
    done
    ended=${killed:-${ended:-, ${SCORER:-score} ended before the others}}
    die "$RUN stopped at step $(reached_step): ${ended#, }; the same command goes on from there"
}

# rollout with this recipe's lengths. It takes the place of the shell, as the other stages of a pipe do, so that no shell stands between
# a stage and what becomes of it.
sample() {
    exec rollout --max-prompt-tokens "$MAX_PROMPT_TOKENS" --max-completion-tokens "$MAX_COMPLETION_TOKENS" --on-long-prompt truncate-left \
        ${CHAT_TEMPLATE_ARG:+--chat-template-arg "$CHAT_TEMPLATE_ARG"} --dtype "$DTYPE" --seed "$SEED" "$@"
}

sample_steps() {
    sample "$RUN/prompts.jsonl" --follow "$RUN" --groups-per-step "$PROMPTS_PER_STEP" --max-staleness "$MAX_STALENESS" \
        -n "$NUM_GENERATIONS" --temperature "$TEMPERATURE" --log "$RUN/rollout.log" "$@"
}

# A stage of the user's takes the place of score: SCORER='./my_reward.py'.
reward() {
    [ -n "$SCORER" ] || exec score --reward "$REWARDS"
    exec sh -c 'echo $$ >"$0" && exec $1' "$RUN/.scorer" "$SCORER"
}

# The same arguments whether the steps come one by one or all in a row: checkpoints remember them.
learn() { train_on --follow "$RUN" --save-every "$SAVE_EVERY" --keep "$KEEP"; }

# grpo-step with this recipe's numbers.
train_on() {
    local more=()
    [ "$BETA" = 0 ] || more+=(--reference "$RUN/checkpoints/step_000000")
    [ -z "$EPSILON_HIGH" ] || more+=(--epsilon-high "$EPSILON_HIGH")
    [ -z "$IMPORTANCE_SAMPLING_CLIP_MAX" ] || more+=(--importance-sampling-clip-max "$IMPORTANCE_SAMPLING_CLIP_MAX")
    exec grpo-step --groups-per-step "$PROMPTS_PER_STEP" --loss "$LOSS" --epsilon "$EPSILON" --beta "$BETA" \
        --kl-estimator "$KL_ESTIMATOR" --scale-rewards "$SCALE_REWARDS" --max-completion-tokens "$MAX_COMPLETION_TOKENS" \
        --max-staleness "$MAX_STALENESS" --learning-rate "$LEARNING_RATE" --schedule "$SCHEDULE" --warmup-ratio "$WARMUP_RATIO" \
        --total-steps "$STEPS" --max-grad-norm "$MAX_GRAD_NORM" --adam-beta1 "$ADAM_BETA1" --adam-beta2 "$ADAM_BETA2" \
        --weight-decay "$WEIGHT_DECAY" --optimizer-state "$OPTIMIZER_STATE" --dtype "$DTYPE" --seed "$SEED" ${more[@]+"${more[@]}"} "$@"
}

# A stage of the user's may be far from reading or writing, and so from noticing that the trainer is gone.
learn_and_end() {
    local code=0
    (learn 2>&3) || code=$?
    if [ "$code" -ne 0 ] && [ -f "$RUN/.scorer" ]; then
        sleep 1
        kill -KILL "$(cat "$RUN/.scorer")" || true
    fi
    rm -f "$RUN/.scorer"
    return "$code"
}
