# Sourced by the scripts beside it: how they run and end, where the commands are, and what is in a run's directory.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/target/release:$PATH"
. pipelines/recipe.sh
. pipelines/steps.sh

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
