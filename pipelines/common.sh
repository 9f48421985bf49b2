# shellcheck shell=bash
# Sourced by the scripts beside it: a run and its recipe, the pipe that trains it, and how both end.

set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $home = */share/grpo-pipes && ! -f $home/Cargo.toml ]]; then
    export PATH="$home/../../bin:$PATH" # installed: runs are where it is called
else
    cd "$home" && export PATH="$home/target/release:$PATH" && home=
fi

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
    begin "runs/$NAME" --recipe "$(recipe_file "$RECIPE")"
}

recipe_file() { echo "${home:+$home/}pipelines/recipes/$1.env"; }

# `auto` is the reference job where it can run fast, else the recipe that runs everywhere.
choose_recipe() {
    local why="GPU and nvcc found"
    RECIPE=qwen2.5-0.5b
    command -v nvcc >/dev/null || RECIPE=tiny why="there is a GPU, but no nvcc to build for it"
    nvidia-smi >/dev/null 2>&1 || RECIPE=tiny why="no NVIDIA GPU found"
    say "recipe: $RECIPE ($why)"
}

# begin RUN [--recipe FILE]: makes the run's directory, or goes on with its own recipe, whose numbers become variables.
begin() {
    local numbers name
    RUN=$1
    numbers=$(grpo-step --begin "$@") || exit
    set_all "$numbers"
    for name in MODEL SYSTEM_PROMPT; do # a recipe's own, which lie beside it
        [ -e "${!name:-.}" ] || [ ! -e "$home/${!name}" ] || printf -v "$name" %s "$home/${!name}"
    done
}

# Sets variables from lines NAME=VALUE of grpo-step, which has checked the names. The values are data: nothing evaluates them.
set_all() {
    local line
    while IFS= read -r line; do
        [ -z "$line" ] || printf -v "${line%%=*}" %s "${line#*=}"
    done <<<"$1"
}

reached_step() { grpo-step --status "$RUN" | sed -n 's/^STEP=//p'; }

# prepare SPLIT COUNT: gsm8k-prep on at most so many problems of this recipe's data.
prepare() {
    local data=("$DATA" --limit "$2")
    [ "$DATA" != generate ] || data=(--generate "$2" --max-number "$MAX_NUMBER")
    gsm8k-prep "${data[@]}" --split "$1" --seed "$SEED" ${SYSTEM_PROMPT:+--system-prompt "$SYSTEM_PROMPT"} "${@:3}"
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

# rollout with this recipe's numbers, on the machines that SAMPLER_RUN brings it to ('srun -n 1'). It takes the place of the shell, as the
# other stages of a pipe do, so that no shell stands between a stage and what becomes of it.
sample() {
    # shellcheck disable=SC2086 # a command and its arguments
    exec ${SAMPLER_RUN:-} rollout --recipe "$RUN/recipe.env" --on-long-prompt truncate-left "$@"
}

# evaluate_as NAME MODEL: greedy and sampled accuracy on held-out problems, and the scored records, in $RUN/eval.
evaluate_as() {
    local out=$RUN/eval/$1
    [ ! -f "$out.sampled.json" ] || return 0
    say "evaluation $1: $TEST_PROMPTS held-out problems"
    prepare test "$TEST_PROMPTS" >"$out.prompts.jsonl"
    measure "$2" "$out.prompts.jsonl" "$out.greedy" --temperature 0 -n 1
    measure "$2" "$out.prompts.jsonl" "$out.sampled" --temperature 1 -n "$TEST_SAMPLES"
}

# measure MODEL PROMPTS OUT ARGUMENT...: OUT.jsonl.zst, and its summary OUT.json.
measure() {
    sample "$2" --model "$1" --log "$3.log" "${@:4}" | score -o "$3.jsonl.zst"
    evaluate "$3.jsonl.zst" --json -o "$3.json"
}

sample_steps() { sample "$RUN/prompts.jsonl" --follow "$RUN" --log "$RUN/rollout.log" "$@"; }

# A stage of the user's takes the place of score: SCORER='./my_reward.py'.
reward() {
    [ -n "$SCORER" ] || exec score --reward "$REWARDS"
    exec sh -c 'echo $$ >"$0" && exec $1' "$RUN/.scorer" "$SCORER"
}

# The same arguments whether the steps come one by one or all in a row: checkpoints remember them.
learn() { train_on --follow "$RUN" ${VERBOSE:+--verbose}; }

# grpo-step with this recipe's numbers, on the machines that TRAINER_RUN brings it to.
train_on() {
    [ "$BETA" = 0 ] || set -- --reference "$RUN/checkpoints/step_000000" "$@"
    # mpirun's own words about an end come after those of the rank that knows why.
    local launch=(env OMPI_MCA_orte_execute_quiet=1 mpirun -n "${RANKS:-1}" --bind-to none)
    [ "${RANKS:-1}" -gt 1 ] || launch=()
    # shellcheck disable=SC2206 # a command and its arguments
    [ -z "${TRAINER_RUN:-}" ] || launch=($TRAINER_RUN)
    exec ${launch[@]+"${launch[@]}"} grpo-step --recipe "$RUN/recipe.env" "$@"
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
