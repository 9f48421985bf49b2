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

# The commit of a step: one rename, so that the policy is always a whole one.
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
    local name=$(step_name "$1") rollouts
    rollouts=$RUN/rollouts/$name.jsonl
    [ -n "$SCORER" ] || rollouts+=.zst
    prompts_of_step "$1" | sample_groups | score_into "$rollouts" || {
        cat "$RUN/rollout.log" >&2
        die "step $1: sampling or scoring failed"
    }
    { sed "$1,\$d" "$RUN/metrics.jsonl" && learn_from "$rollouts" "$RUN/checkpoints/$name"; } >"$RUN/.metrics.jsonl"
    mv "$RUN/.metrics.jsonl" "$RUN/metrics.jsonl"
    point_policy_at "$name"
    forget "$(($1 - 1))"
}

prompts_of_step() {
    sed -n "$((($1 - 1) * PROMPTS_PER_STEP + 1)),$(($1 * PROMPTS_PER_STEP))p" "$RUN/prompts.jsonl"
}

sample_groups() {
    sample --model "$RUN/policy" -n "$NUM_GENERATIONS" --temperature "$TEMPERATURE" --on-long-prompt truncate-left \
        2>"$RUN/rollout.log"
}

# A stage of the user's takes the place of score: SCORER='./my_reward.py'.
score_into() {
    if [ -z "$SCORER" ]; then
        score --reward "$REWARDS" -o "$1"
    else
        $SCORER >"$1.tmp" && mv "$1.tmp" "$1"
    fi
}

learn_from() {
    local reference=()
    [ "$BETA" = 0 ] || reference=(--reference "$RUN/checkpoints/$(step_name 0)")
    rm -rf "$2"
    grpo-step "$1" --policy "$RUN/policy" --out "$2" --loss "$LOSS" --epsilon "$EPSILON" \
        --beta "$BETA" ${reference[@]+"${reference[@]}"} --max-completion-tokens "$MAX_COMPLETION_TOKENS" \
        --learning-rate "$LEARNING_RATE" --schedule "$SCHEDULE" --warmup-ratio "$WARMUP_RATIO" --total-steps "$STEPS" \
        --adam-beta1 "$ADAM_BETA1" --adam-beta2 "$ADAM_BETA2" --weight-decay "$WEIGHT_DECAY" \
        --max-grad-norm "$MAX_GRAD_NORM" --seed "$SEED"
}

# Checkpoints between those to keep go as soon as the policy has left them.
forget() {
    [ "$1" -eq 0 ] || [ $(($1 % SAVE_EVERY)) -eq 0 ] || rm -rf "$RUN/checkpoints/$(step_name "$1")"
}
