# Sourced by the scripts beside it: the recipe's numbers, the run's directory, and where the commands are.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/target/release:$PATH"

say() { echo "$*" >&2; }
die() {
    say "error: $1"
    exit "${2:-1}"
}

# Runs a function of this script as a process group of its own, and ends with its code. What ends the script ends the group: a signal
# comes to it as SIGINT, which no shell obeys before the commands it waits for. Nothing of the group outlives the script.
run_as_group() {
    local group code=0 told=
    set -m
    {
        set +m
        trap '' TERM # also if everybody gets it
        {
            while kill -0 $$ 2>/dev/null; do sleep 0.5; done
            kill -KILL 0
        } </dev/null >/dev/null 2>&1 &
        "$@"
    } &
    group=$!
    set +m
    trap 'told=129; kill -INT -- -$group' HUP
    trap 'told=130; kill -INT -- -$group' INT
    trap 'told=143; kill -INT -- -$group' TERM
    trap 'kill -STOP -- -$group; kill -STOP $$; kill -CONT -- -$group' TSTP
    while kill -0 "$group" 2>/dev/null; do # a signal ends `wait`, but not yet the group
        wait "$group" && code=0 || code=$?
    done
    kill -KILL -- "-$group" 2>/dev/null || true
    code=${told:-$code}
    [ "$code" -le 128 ] || say "$RUN was ended by signal $((code - 128))$(where_it_is); the same command goes on from there"
    exit "$code"
}

where_it_is() { [ ! -L "$RUN/policy" ] || echo " at step $(reached_step)"; }

# `auto` is the reference job where it can run fast, else the recipe that runs everywhere.
choose_recipe() {
    RECIPE=${RECIPE:-auto}
    ! is_fork || RECIPE="of $NAME"
    [ "$RECIPE" = auto ] || return 0
    if ! command -v nvidia-smi >/dev/null || ! nvidia-smi >/dev/null 2>&1; then
        RECIPE=tiny
        say "recipe: tiny (no NVIDIA GPU found)"
    elif ! command -v nvcc >/dev/null; then
        RECIPE=tiny
        say "recipe: tiny (there is a GPU, but no nvcc to build for it)"
    else
        RECIPE=qwen2.5-0.5b
        say "recipe: qwen2.5-0.5b (GPU and nvcc found)"
    fi
}

# Whether NAME is a run that fork.sh began: its recipe is in no other place.
is_fork() { [ -n "${NAME:-}" ] && grep -qs '^FORK=' "runs/$NAME/recipe.env"; }

load_recipe() {
    local file=pipelines/recipes/$RECIPE.env
    recipe_names=()
    SCORER=${SCORER:-} # a command: never taken from a file
    if is_fork; then
        read_numbers "runs/$NAME/recipe.env"
    else
        [ -f "$file" ] || die "no recipe $RECIPE; there are: $(cd pipelines/recipes && echo *.env | sed 's/\.env//g')" 2
        recipe_names=(SEED SCORER) # a run's rewards are as much its own as its numbers
        SEED=${SEED:-1}
        read_numbers "$file"
        NAME=${NAME:-$RECIPE-$SEED}
    fi
    RUN=runs/$NAME
}

# Sets every name in a file that the environment has not set already. A file is data, wherever it comes from: bash would run commands
# that stand in the brackets of a name, or of what it takes for a number, so neither is touched before it is known to be one.
read_numbers() {
    local line name at=0 numbers texts
    read_kinds
    while IFS= read -r line || [ -n "$line" ]; do
        at=$((at + 1))
        line=${line%%#*}
        line=${line%"${line##*[![:space:]]}"}
        [ -n "$line" ] || continue
        [[ $line =~ ^([A-Z][A-Z0-9_]*)=([^[:cntrl:]]*)$ ]] || die "$1:$at: not NAME=VALUE" 3
        name=${BASH_REMATCH[1]}
        case $numbers$texts in
        *" $name "*) ;;
        *) die "$1:$at: a recipe has no $name; the names are those of pipelines/recipes/tiny.env" 3 ;;
        esac
        if [ -n "${!name+set}" ]; then
            check_value "$name" "${!name}" "environment" 2
        else
            check_value "$name" "${BASH_REMATCH[2]}" "$1:$at" 3
            printf -v "$name" %s "${line#*=}"
        fi
        recipe_names+=("$name")
    done <"$1"
}

NUMBER='^[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?$'

# The names that a recipe may have are those of `tiny`, and what is a number there is one everywhere.
read_kinds() {
    local line
    numbers=' SEED ' texts=' SCORER FORK '
    while IFS= read -r line; do
        [[ $line =~ ^([A-Z][A-Z0-9_]*)=([^[:space:]]*) ]] || continue
        if [[ ${BASH_REMATCH[2]} =~ $NUMBER ]]; then
            numbers+="${line%%=*} "
        else
            texts+="${line%%=*} "
        fi
    done <pipelines/recipes/tiny.env
}

# check_value NAME VALUE WHERE CODE: a text that began like an option would be taken for one.
check_value() {
    case $numbers in *" $1 "*) [[ $2 =~ $NUMBER ]] || die "$3: $1 is a number, and not \"$2\"" "$4" ;; esac
    [[ $2 != -* ]] || die "$3: $1 begins with a minus" "$4"
}

# A run keeps the numbers it started with: going on with others would be another run.
pin_recipe() {
    mkdir -p "$RUN/checkpoints" "$RUN/rollouts" "$RUN/eval"
    local name
    for name in "${recipe_names[@]}"; do printf '%s=%s\n' "$name" "${!name}"; done >"$RUN/.recipe.env"
    if [ -f "$RUN/recipe.env" ] && ! diff "$RUN/recipe.env" "$RUN/.recipe.env" >"$RUN/.difference"; then
        sed -n 's/^</  was:/p; s/^>/  now:/p' "$RUN/.difference" >&2
        rm "$RUN/.recipe.env" "$RUN/.difference"
        say "other numbers go into another NAME, or a fork: make fork RUN=$NAME FROM=$(step_name "$(reached_step)") NAME=... NUMBER=..."
        die "$RUN was started with other numbers; go on with those" 2
    fi
    rm -f "$RUN/.difference"
    [ -f "$RUN/recipe.env" ] || sync "$RUN/.recipe.env" # before its name says that it is whole
    mv "$RUN/.recipe.env" "$RUN/recipe.env"
}

step_name() { printf 'step_%06d' "$1"; }

# The step that the policy has reached: the number in the name its link points to; 0 when there is none.
reached_step() {
    local target=
    [ ! -L "$RUN/policy" ] || target=$(readlink "$RUN/policy")
    step_in "${target##*/}" || echo 0
}

# The number in the name of a step's files.
step_in() { [[ $1 =~ ^step_([0-9]+)(\.|$) ]] && echo $((10#${BASH_REMATCH[1]})); }

# One rename, so that the policy is always a whole one.
point_policy_at() {
    ln -sfn "checkpoints/$1" "$RUN/.policy"
    mv -fT "$RUN/.policy" "$RUN/policy" 2>/dev/null || mv -fh "$RUN/.policy" "$RUN/policy" # GNU, or BSD
}

# gsm8k-prep on this recipe's data: at most COUNT problems of SPLIT.
prepare() {
    local split=$1 count=$2
    shift 2
    local arguments=(--split "$split" --seed "$SEED" "$@")
    [ -z "$SYSTEM_PROMPT" ] || arguments+=(--system-prompt "$SYSTEM_PROMPT")
    if [ "$DATA" = generate ]; then
        gsm8k-prep --generate "$count" --max-number "$MAX_NUMBER" "${arguments[@]}"
    else
        gsm8k-prep "$DATA" --limit "$count" "${arguments[@]}"
    fi
}

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
