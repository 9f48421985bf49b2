# shellcheck shell=bash
# Sourced by run.sh: samples of ours and of the peers.

calculate() { awk "BEGIN { print $1 }"; }
note() { echo "$2" >>"$WORK/samples/$1"; }
median() { sort -g "$WORK/samples/$1" | awk '{ v[NR] = $1 } END { print (v[int((NR + 1) / 2)] + v[int(NR / 2) + 1]) / 2 }'; }
smallest() { sort -g "$WORK/samples/$1" | head -n 1; }
largest() { sort -g "$WORK/samples/$1" | tail -n 1; }
measured() { [ -s "$WORK/samples/$1" ]; }

# Runs a command: its wall time [s] in $taken, its peak memory [MiB] in $peak, its output in $WORK/output. The report names it once.
run() { try "$@" || die "failed: $*"; }

# As run, for a command that may fail.
try() {
    local began time=()
    [ ! -x /usr/bin/time ] || time=(/usr/bin/time -f %M -o "$WORK/peak")
    grep -qsxF -- "$*" "$WORK/commands" || echo "$*" >>"$WORK/commands"
    began=$EPOCHREALTIME
    "${time[@]}" "$@" >"${output:-$WORK/output}" 2>"$WORK/stderr" || { cat "$WORK/stderr" >&2 && return 1; }
    taken=$(calculate "$EPOCHREALTIME - $began")
    peak=$([ ! -s "$WORK/peak" ] || calculate "$(tail -n 1 "$WORK/peak") / 1024")
}

# peer NAME SCRIPT ARGUMENT...: samples of NAME and of NAME.peak, when the packages are there and the peer does not crash. OpenMP's
# default, to spin at barriers, is many times slower than the alternatives on a tiny model when anything else runs: the first turn tries the settings, the fastest stays.
peer() {
    local name=$1 setting chosen=$WORK/$1.setting
    case $2 in
    llama*) [ -n "$llama" ] || return 0 ;;
    *) [ -n "$versions" ] || return 0 ;;
    esac
    [ "$settings" != "${settings% *}" ] || echo "$settings" >"$chosen"
    if [ ! -f "$chosen" ]; then
        for setting in $settings; do
            peer_once "$setting" "${@:2}" || speed=0
            echo "$speed $setting"
        done | sort -gr | head -n 1 | cut -d ' ' -f 2 >"$chosen"
    fi
    if peer_once "$(cat "$chosen")" "${@:2}"; then
        note "$name" "$value"
        note "$name.peak" "${peak:-0}"
    fi
}

# peer_once THREADS:WAIT_POLICY SCRIPT ARGUMENT...: its number in $value, in $speed one that is larger the faster it was.
peer_once() {
    if ! OMP_NUM_THREADS=${1%:*} MKL_NUM_THREADS=${1%:*} OMP_WAIT_POLICY=${1#*:} try "$PYTHON" "$peers/$2.py" "${@:3}"; then
        say "a peer failed and is left out: $2 ${*:3}"
        return 1
    fi
    value=$(tail -n 1 "$WORK/output" | cut -d ' ' -f 1)
    case $2 in
    *_step) speed=$(calculate "1 / $value") ;;
    *) speed=$value ;;
    esac
}

# package_versions NAME...: of those packages, and of Python; nothing where one is missing.
package_versions() {
    "$PYTHON" - "$@" 2>/dev/null <<'EOF' || true
import sys
from importlib.metadata import version
from platform import python_version
print(f"Python {python_version()},", ", ".join(f"{name} {version(name)}" for name in sys.argv[1:]))
EOF
}

# A model directory from the one that has config and tokenizer: random weights, and an end token that never comes.
random_model() {
    grpo-step --init --seed 1 --policy "$1" --out "$2" --weights-only </dev/null >/dev/null
    rm -f "$2/generation_config.json"
    echo '{"eos_token_id": 999999999, "pad_token_id": 0}' >"$2/generation_config.json"
}

made_up_rewards() { perl pipelines/bench/made-up-rewards.pl; }

# What ours and the peers compute in: products and, in sampling, weights.
dtype=f32

# sampling NAME MODEL PROMPTS GENERATIONS TOKENS TIMES: tokens/s. Ours: the process from start to end, over TIMES x PROMPTS prompts.
sampling() {
    local name=$1 model=$2 prompts=$3 generations=$4 tokens=$5 times=$6
    head -n $((prompts * times)) "$model.prompts" >"$WORK/$name.jsonl"
    run rollout "$WORK/$name.jsonl" --model "$model" -n "$generations" --max-sequences $((prompts * generations)) \
        --max-completion-tokens "$tokens" --dtype $dtype
    note "$name" "$(calculate "$times * $prompts * $generations * $tokens / $taken")"
    note "$name.peak" "${peak:-0}"
    PEER_DTYPE=$dtype peer "$name.peer" generate "$model" "$model.prompts" --prompts "$prompts" --generations "$generations" --new-tokens "$tokens" \
        --times $((times < 3 ? 1 : 3))
}

# training NAME MODEL GROUPS STEPS PEER_STEPS: seconds a step on the records in MODEL.scored, from one line of metrics to the next, so that
# loading, the first step and writing are left out as they are for the peer.
training() {
    local name=$1 model=$2 groups=$3 steps=$4 peer_steps=$5 sequences
    sequences=$(wc -l <"$model.scored")
    rm -rf "$WORK/trained" "$WORK/lines"
    mkfifo "$WORK/lines"
    while read -r _; do echo "$EPOCHREALTIME"; done <"$WORK/lines" >"$WORK/ends" &
    output=$WORK/lines run grpo-step "$model.scored" --policy "$model" --out "$WORK/trained" --loss grpo --groups-per-step "$groups" \
        --max-staleness any --weights-only --dtype $dtype
    wait $!
    rm -rf "$WORK/trained"
    awk 'NR > 1 { print $1 - before } { before = $1 }' "$WORK/ends" >"$WORK/samples/of_steps"
    note "$name" "$(median of_steps)"
    note "$name.peak" "${peak:-0}"
    PEER_DTYPE=$dtype peer "$name.peer" train_step "$model" "$model.scored" --sequences-per-step $((sequences / steps)) --times "$peer_steps" \
        --warm-up $((peer_steps < 3 ? 1 : 2))
}

back_to_start() { ln -sfn checkpoints/step_000000 "$RUN/policy"; }

# time_steps NAME: seconds of each step of the run in one pipe, from one line of metrics to the next; the first two of ten do not count.
time_steps() {
    train_steps 2>"$WORK/said" | while read -r _; do echo "$EPOCHREALTIME"; done >"$WORK/ends" || { tail -n 3 "$WORK/said" >&2 && return 1; }
    awk 'NR > 2 { print $1 - before } { before = $1 }' "$WORK/ends" >"$WORK/samples/$1"
    split_of_step
}

# Where the time of the steps after the first went, as both ends of the pipe say it, the trainer in $WORK/said [%]. Until the last line of
# metrics: the checkpoint that a run ends with would be most of ten steps, and hardly shows in hundreds.
split_of_step() {
    local whole sampling training loading handing
    whole=$(awk 'NR == 1 { first = $1 } END { print $1 - first }' "$WORK/ends")
    read -r training handing < <(sed -n 's/^grpo-step: spent .* training \([0-9.]*\) s, handing over \([0-9.]*\) s.*/\1 \2/p' "$WORK/said")
    read -r sampling loading < <(sed -n 's/^rollout: spent .* sampling \([0-9.]*\) s, .* loading them \([0-9.]*\) s.*/\1 \2/p' "$RUN/rollout.log")
    note split.sampling "$(calculate "100 * $sampling / $whole")"
    note split.training "$(calculate "100 * $training / $whole")"
    note split.weights "$(calculate "100 * ($handing + $loading) / $whole")"
    note split.rest "$(calculate "100 * ($whole - $sampling - $training - $handing - $loading) / $whole")"
}
