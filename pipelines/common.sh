# Sourced by the scripts beside it: the recipe's numbers, the run's directory, and where the commands are.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/target/release:$PATH"

say() { echo "$*" >&2; }
die() {
    say "error: $1"
    exit "${2:-1}"
}

# `auto` is the reference job where it can run fast, else the recipe that runs everywhere.
choose_recipe() {
    RECIPE=${RECIPE:-auto}
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

# Sets every name in the recipe that the environment has not set already.
load_recipe() {
    local file=pipelines/recipes/$RECIPE.env line name value
    [ -f "$file" ] || die "no recipe $RECIPE; there are: $(cd pipelines/recipes && echo *.env | sed 's/\.env//g')" 2
    recipe_names=(SEED SCORER) # a run's rewards are as much its own as its numbers
    SEED=${SEED:-1}
    SCORER=${SCORER:-}
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line%%#*}
        line=${line%"${line##*[![:space:]]}"}
        [ -n "$line" ] || continue
        name=${line%%=*}
        value=${line#*=}
        recipe_names+=("$name")
        [ -n "${!name+set}" ] || printf -v "$name" %s "$value"
    done <"$file"
    NAME=${NAME:-$RECIPE-$SEED}
    RUN=runs/$NAME
}

# A run keeps the numbers it started with: going on with others would be another run.
pin_recipe() {
    mkdir -p "$RUN/checkpoints" "$RUN/rollouts" "$RUN/eval"
    local name
    for name in "${recipe_names[@]}"; do printf '%s=%s\n' "$name" "${!name}"; done >"$RUN/.recipe.env"
    if [ -f "$RUN/recipe.env" ] && ! diff "$RUN/recipe.env" "$RUN/.recipe.env" >"$RUN/.difference"; then
        sed -n 's/^</  was:/p; s/^>/  now:/p' "$RUN/.difference" >&2
        rm "$RUN/.recipe.env" "$RUN/.difference"
        die "$RUN was started with other numbers; give this one another NAME, or go on with the old ones" 2
    fi
    rm -f "$RUN/.difference"
    mv "$RUN/.recipe.env" "$RUN/recipe.env"
}

step_name() { printf 'step_%06d' "$1"; }

# The step that the policy has reached: the number in the name its link points to.
reached_step() {
    local target
    target=$(basename "$(readlink "$RUN/policy")")
    echo $((10#${target#step_}))
}

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

# rollout with the lengths this recipe trains with.
sample() {
    rollout --max-prompt-tokens "$MAX_PROMPT_TOKENS" --max-completion-tokens "$MAX_COMPLETION_TOKENS" --seed "$SEED" "$@"
}

# Step NUMBER by files. What an interrupted attempt left is made again: the same numbers give the same bytes.
train_one_step() {
    local scored=$RUN/.scored.tmp
    prompts_of_step "$1" | sample_groups --model "$RUN/policy" 2>"$RUN/rollout.log" | reward >"$scored" || {
        cat "$RUN/rollout.log" >&2
        die "step $1: sampling or scoring failed"
    }
    learn <"$scored"
    rm "$scored"
}

prompts_of_step() {
    sed -n "$((($1 - 1) * PROMPTS_PER_STEP + 1)),$(($1 * PROMPTS_PER_STEP))p" "$RUN/prompts.jsonl"
}

# All steps that are left, in one pipe: records go forward through it, weights back through $RUN/live. Metrics on stdout.
train_steps() {
    sample_as_it_learns | reward | learn || name_the_cause "${PIPESTATUS[@]}"
}

sample_as_it_learns() {
    : >"$RUN/rollout.log"
    { sample_groups "$RUN/prompts.jsonl" --follow "$RUN" --groups-per-step "$PROMPTS_PER_STEP" 2>&1 >&3 | keep_log; } 3>&1
}

# What rollout says goes to its log, and to the terminal when it is not just how far it is.
keep_log() {
    local line
    while IFS= read -r line; do
        echo "$line" >>"$RUN/rollout.log"
        case $line in
        *" tokens/s" | "rollout: done in "*) ;;
        *) say "$line" ;;
        esac
    done
}

# name_the_cause CODE_OF_ROLLOUT CODE_OF_SCORE CODE_OF_GRPO_STEP
name_the_cause() {
    local name causes=
    for name in rollout "${SCORER:-score}" grpo-step; do
        if [ "$1" -gt 128 ]; then
            causes+=", $name was killed by signal $(($1 - 128))"
        elif [ "$1" -ne 0 ]; then
            causes+=", $name ended with code $1"
        fi
        shift
    done
    die "$RUN stopped at step $(reached_step): ${causes#, }"
}

sample_groups() {
    sample -n "$NUM_GENERATIONS" --temperature "$TEMPERATURE" --on-long-prompt truncate-left "$@"
}

# A stage of the user's takes the place of score: SCORER='./my_reward.py'.
reward() {
    if [ -z "$SCORER" ]; then score --reward "$REWARDS"; else $SCORER; fi
}

# The same arguments whether the steps come one by one or all in a row: checkpoints remember them.
learn() {
    local reference=()
    [ "$BETA" = 0 ] || reference=(--reference "$RUN/checkpoints/$(step_name 0)")
    grpo-step --follow "$RUN" --groups-per-step "$PROMPTS_PER_STEP" --save-every "$SAVE_EVERY" --loss "$LOSS" --epsilon "$EPSILON" \
        --beta "$BETA" ${reference[@]+"${reference[@]}"} --max-completion-tokens "$MAX_COMPLETION_TOKENS" \
        --learning-rate "$LEARNING_RATE" --schedule "$SCHEDULE" --warmup-ratio "$WARMUP_RATIO" --total-steps "$STEPS" \
        --adam-beta1 "$ADAM_BETA1" --adam-beta2 "$ADAM_BETA2" --weight-decay "$WEIGHT_DECAY" \
        --max-grad-norm "$MAX_GRAD_NORM" --seed "$SEED"
}
