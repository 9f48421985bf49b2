#!/usr/bin/env bash
# Speed and memory of the commands, and of PyTorch, transformers and TRL at the same work in the same run. A Markdown report on stdout.
# PYTHON has the packages of tests/bench/peers/requirements.txt, else only our side is measured. LARGE= leaves the 0.5B shape out.
. "$(dirname "$0")/common.sh"

PYTHON=${PYTHON:-python3}
THREADS=${THREADS:-2}
REPEATS=${REPEATS:-5}                              # runs of each side, taking turns
LARGE=${LARGE-../shared/qwen2.5-0.5b-instruct}     # directory with config.json and tokenizer; random weights are made
LARGE_REPEATS=${LARGE_REPEATS:-3}
export RAYON_NUM_THREADS=$THREADS OMP_NUM_THREADS=$THREADS MKL_NUM_THREADS=$THREADS PYTHONDONTWRITEBYTECODE=1

RECIPE=tiny SEED=1
load_recipe
weights=0
mkdir -p target
WORK=$(mktemp -d target/bench.XXXXXX)
trap 'rm -rf "$WORK"' EXIT
TINY=$WORK/tiny RUN=$WORK/run
mkdir "$WORK/samples"
peers=tests/bench/peers
settings="$THREADS:active $THREADS:passive 1:passive"

calculate() { awk "BEGIN { print $1 }"; }
note() { echo "$2" >>"$WORK/samples/$1"; }
median() { sort -g "$WORK/samples/$1" | awk '{ v[NR] = $1 } END { print (v[int((NR + 1) / 2)] + v[int(NR / 2) + 1]) / 2 }'; }
smallest() { sort -g "$WORK/samples/$1" | head -n 1; }
largest() { sort -g "$WORK/samples/$1" | tail -n 1; }
measured() { [ -s "$WORK/samples/$1" ]; }

# Runs a command: its wall time [s] in $taken, its peak memory [MiB] in $peak, its output in $WORK/output. The report names it once.
run() {
    local began time=()
    [ ! -x /usr/bin/time ] || time=(/usr/bin/time -f %M -o "$WORK/peak")
    grep -qsxF -- "$*" "$WORK/commands" || echo "$*" >>"$WORK/commands"
    began=$EPOCHREALTIME
    "${time[@]}" "$@" >"${output:-$WORK/output}" 2>"$WORK/stderr" || { cat "$WORK/stderr" >&2 && die "failed: $*"; }
    taken=$(calculate "$EPOCHREALTIME - $began")
    peak=$([ ! -s "$WORK/peak" ] || calculate "$(tail -n 1 "$WORK/peak") / 1024")
}

# peer NAME SCRIPT ARGUMENT...: samples of NAME and of NAME.peak, when the packages are there. OpenMP's default, to spin at barriers,
# is many times slower than the alternatives on a tiny model when anything else runs: the first turn tries the settings, the fastest stays.
peer() {
    local name=$1 setting chosen=$WORK/$1.setting
    [ -n "$versions" ] || return 0
    [ "$settings" != "${settings% *}" ] || echo "$settings" >"$chosen"
    if [ ! -f "$chosen" ]; then
        for setting in $settings; do
            peer_once "$setting" "${@:2}"
            echo "$speed $setting"
        done | sort -gr | head -n 1 | cut -d ' ' -f 2 >"$chosen"
    fi
    peer_once "$(cat "$chosen")" "${@:2}"
    note "$name" "$value"
    note "$name.peak" "${peak:-0}"
}

# peer_once THREADS:WAIT_POLICY SCRIPT ARGUMENT...: its number in $value, in $speed one that is larger the faster it was.
peer_once() {
    OMP_NUM_THREADS=${1%:*} MKL_NUM_THREADS=${1%:*} OMP_WAIT_POLICY=${1#*:} run "$PYTHON" "$peers/$2.py" "${@:3}"
    value=$(tail -n 1 "$WORK/output" | cut -d ' ' -f 1)
    case $2 in
    *_step) speed=$(calculate "1 / $value") ;;
    *) speed=$value ;;
    esac
}

package_versions() {
    "$PYTHON" - 2>/dev/null <<'EOF' || true
from importlib.metadata import version
from platform import python_version
print(f"Python {python_version()},", ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl")))
EOF
}

# A model directory from the one that has config and tokenizer: random weights, and an end token that never comes.
random_model() {
    grpo-step --init --seed 1 --policy "$1" --out "$2" --weights-only </dev/null >/dev/null
    rm -f "$2/generation_config.json"
    echo '{"eos_token_id": 999999999, "pad_token_id": 0}' >"$2/generation_config.json"
}

# Random weights earn no rewards: made up ones, different within a group, give every token a gradient.
made_up_rewards() { awk '{ sub(/}$/, ",\"reward\":" (NR * 7 % 5) "}"); print }'; }

# sampling NAME MODEL PROMPTS GENERATIONS TOKENS TIMES: tokens/s. Ours: the process from start to end, over TIMES x PROMPTS prompts.
sampling() {
    local name=$1 model=$2 prompts=$3 generations=$4 tokens=$5 times=$6
    head -n $((prompts * times)) "$model.prompts" >"$WORK/$name.jsonl"
    run rollout "$WORK/$name.jsonl" --model "$model" -n "$generations" --max-sequences $((prompts * generations)) \
        --max-completion-tokens "$tokens"
    note "$name" "$(calculate "$times * $prompts * $generations * $tokens / $taken")"
    note "$name.peak" "${peak:-0}"
    peer "$name.peer" generate "$model" "$model.prompts" --prompts "$prompts" --generations "$generations" --new-tokens "$tokens" \
        --times $((times < 3 ? 1 : 3))
}

# training NAME MODEL GROUPS STEPS PEER_STEPS: seconds a step on the records in MODEL.scored. Ours: what all steps take longer than the
# first alone, so that loading, the first step and writing are left out as they are for the peer.
training() {
    local name=$1 model=$2 groups=$3 steps=$4 peer_steps=$5 sequences first
    sequences=$(wc -l <"$model.scored")
    head -n $((sequences / steps)) "$model.scored" >"$model.first"
    train_on "$model.first"
    first=$taken
    train_on "$model.scored"
    note "$name" "$(calculate "($taken - $first) / ($steps - 1)")"
    note "$name.peak" "${peak:-0}"
    peer "$name.peer" train_step "$model" "$model.scored" --sequences-per-step $((sequences / steps)) --times "$peer_steps" \
        --warm-up $((peer_steps < 3 ? 1 : 2))
}

train_on() {
    rm -rf "$WORK/trained"
    run grpo-step "$1" --policy "$model" --out "$WORK/trained" --loss grpo --groups-per-step "$groups" --max-staleness any --weights-only
    rm -rf "$WORK/trained"
}

# Whole steps from the same start against TRL's: in one pipe, from one line of metrics to the next, and by files, three processes
# each. The first two of ten do not count.
whole_step() {
    local step began
    point_policy_at "$(step_name 0)"
    for step in {1..10}; do
        began=$EPOCHREALTIME
        train_one_step "$step" >"$WORK/output"
        [ "$step" -le 2 ] || calculate "$EPOCHREALTIME - $began"
    done >"$WORK/samples/of_run"
    note by_files "$(median of_run)"
    point_policy_at "$(step_name 0)"
    train_steps | while read -r _; do echo "$EPOCHREALTIME"; done |
        awk 'NR > 2 { print $1 - before } { before = $1 }' >"$WORK/samples/of_run"
    note whole "$(median of_run)"
    sed -n 's/.*"completions\/mean_length":\([0-9.]*\).*/\1/p' "$RUN/metrics.jsonl" | tail -n 8 |
        awk '{ sum += $1 } END { print sum / NR }' >>"$WORK/samples/whole.length"
    peer whole.peer trl_step "$RUN/checkpoints/$(step_name 0)" "$RUN/prompts.jsonl" --prompts-per-step "$PROMPTS_PER_STEP" \
        --generations "$NUM_GENERATIONS" --new-tokens "$MAX_COMPLETION_TOKENS" --learning-rate "$LEARNING_RATE"
    [ -z "$versions" ] || cut -d ' ' -f 2 "$WORK/output" | tail -n 1 >>"$WORK/samples/whole.peer.length"
}

# A start that knows the format more or less, so that groups have different rewards.
start_run() {
    mkdir -p "$RUN/checkpoints" "$RUN/rollouts"
    prepare train $((10 * PROMPTS_PER_STEP)) -o "$RUN/prompts.jsonl"
    prepare train $((400 * SUPERVISED_BATCH)) --demonstrations --sloppy-format "$SLOPPY_FORMAT" --sloppy-arithmetic "$SLOPPY_ARITHMETIC" |
        grpo-step --supervised --init --policy "$MODEL" --out "$RUN/supervised" --loss-on-prompt --seed 1 \
            --groups-per-step "$SUPERVISED_BATCH" --learning-rate "$SUPERVISED_LEARNING_RATE" >"$RUN/supervised.jsonl"
    export-hf "$RUN/supervised" "$RUN/checkpoints/$(step_name 0)" --dtype f32
}

scoring() {
    output=/dev/null run score "$WORK/rollouts.jsonl"
    note score "$(calculate "$(wc -l <"$WORK/rollouts.jsonl") / $taken")"
    note score.peak "${peak:-0}"
    peer score.peer score "$WORK/some_rollouts.jsonl"
}

measure_tiny() {
    say "tiny shape: making what is measured on"
    random_model "$MODEL" "$TINY"
    prepare train 256 -o "$TINY.prompts"
    head -n 120 "$TINY.prompts" | rollout --model "$TINY" -n 16 --max-completion-tokens 48 2>/dev/null | made_up_rewards >"$TINY.scored"
    start_run
    head -n 64 "$TINY.prompts" | rollout --model "$RUN/checkpoints/$(step_name 0)" -n 16 --max-completion-tokens 48 \
        >"$WORK/some_rollouts.jsonl" 2>/dev/null
    for _ in {1..400}; do cat "$WORK/some_rollouts.jsonl"; done >"$WORK/rollouts.jsonl"
    for ((i = 1; i <= REPEATS; i++)); do
        say "tiny shape: $i of $REPEATS"
        sampling tiny_sampling "$TINY" 4 16 48 64
        training tiny_training "$TINY" 4 30 8
        whole_step
        scoring
    done
    rm "$WORK/rollouts.jsonl"
}

measure_large() {
    local model=$WORK/large prompt settings=$THREADS:passive
    say "0.5B shape: making what is measured on"
    random_model "$LARGE" "$model"
    gsm8k-prep "${GSM8K:-../shared/gsm8k/train.jsonl}" --limit 16 -o "$model.prompts"
    prompt=$(head -n 1 "$model.prompts" | rollout --model "$model" --max-completion-tokens 1 2>/dev/null |
        sed 's/.*"prompt_token_ids":\[\([0-9,]*\)\].*/\1/' | tr , '\n' | wc -l)
    for _ in 1 2 3; do head -n 1 "$model.prompts"; done | awk '{ sub(/"prompt_id":"/, "&" NR "/"); print }' |
        rollout --model "$model" -n 4 --max-sequences 12 --max-completion-tokens $((220 - prompt)) 2>/dev/null | made_up_rewards >"$model.scored"
    for ((i = 1; i <= LARGE_REPEATS; i++)); do
        say "0.5B shape: $i of $LARGE_REPEATS"
        sampling large_group "$model" 1 16 64 1
        sampling large_prompts "$model" 16 1 64 1
        training large_training "$model" 1 3 2
    done
    weights=$(calculate "$(stat -c %s "$model/model.safetensors") / 1048576")
}

# A number with its smallest and largest, in three digits.
cell() {
    measured "$1" || { echo "not measured" && return; }
    awk -v m="$(median "$1")" -v a="$(smallest "$1")" -v b="$(largest "$1")" '
        function three(x) { return x >= 100 ? sprintf("%.0f", x) : x >= 10 ? sprintf("%.1f", x) : x >= 1 ? sprintf("%.2f", x) : sprintf("%.3f", x) }
        BEGIN { printf "%s (%s-%s)", three(m), three(a), three(b) }'
}

# row WHAT UNIT NAME WANTED: the ratio says how many times faster we are, whatever the unit.
row() {
    local ratio='-'
    measured "$3" || return 0
    ! measured "$3.peer" || case $2 in
    */s) ratio=$(calculate "$(median "$3") / $(median "$3.peer")") ;;
    *) ratio=$(calculate "$(median "$3.peer") / $(median "$3")") ;;
    esac
    [ "$ratio" = - ] || ratio=$(printf %.2fx "$ratio")
    echo "| $1 | $2 | $(cell "$3") | $(cell "$3.peer") | $(cat "$WORK/$3.peer.setting" 2>/dev/null || echo -) | $ratio | $4 |"
}

memory_row() { ! measured "$2.peak" || echo "| $1 | $(cell "$2.peak") | $(cell "$2.peer.peak") | $3 |"; }

speed_rows() {
    row 'tiny: sampling, 64 sequences (4 prompts x 16), 48 tokens; `generate`' tokens/s tiny_sampling 3x
    row 'tiny: training step, 64 sequences; plain PyTorch' s tiny_training 2x
    row "tiny: whole GRPO step, $PROMPTS_PER_STEP prompts x $NUM_GENERATIONS; TRL" s whole 5x
    row "tiny: the same by files, each command started anew" s by_files -
    row '0.5B: sampling, 16 sequences of 1 prompt, 64 tokens; `generate`' tokens/s large_group 2x
    row '0.5B: sampling, 16 sequences of 16 prompts, 64 tokens; `generate`' tokens/s large_prompts 2x
    row '0.5B: training step, 4 x 220 tokens; plain PyTorch' s large_training 1x
    row '`score`; the five functions in Python' records/s score '200,000 records/s'
}

memory_rows() {
    memory_row 'tiny: sampling' tiny_sampling -
    memory_row 'tiny: training step' tiny_training -
    memory_row '`score`' score -
    [ "$weights" != 0 ] || return 0
    memory_row '0.5B: sampling, 1 prompt' large_group "$(allowed 1) (weights + KV + 300)"
    [ "$weights" != 0 ] || return 0
    memory_row '0.5B: sampling, 16 prompts' large_prompts "$(allowed 16) (weights + KV + 300)"
    memory_row '0.5B: training step' large_training 10240
}

report() {
    local model memory
    model=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)
    memory=$(awk '/^MemTotal/ { printf "%.0f GiB", $2 / 1048576 }' /proc/meminfo)
    cat <<EOF
# Benchmark on the CPU, $(date -u +%F)

$model, $(nproc) cores, $memory; $(uname -sr); load $(cut -d ' ' -f 1 <"$WORK/load") before the run.
Commit $(git rev-parse --short HEAD)$(git diff --quiet HEAD || echo ' with changes'), $(rustc --version | cut -d ' ' -f 1,2).
Peers: ${versions:-not measured, $PYTHON lacks the packages of $peers/requirements.txt}.
f32; ours on $THREADS threads, each peer on the fastest of $settings (threads:OMP_WAIT_POLICY; 0.5B: $THREADS:passive). Median (smallest-largest) of $REPEATS runs, of $LARGE_REPEATS for the 0.5B shape; the sides take turns.
Ours are whole processes, start, loading and writing included, but for the training steps; the peers' import, loading and first calls
are not counted.

| what | unit | ours | peer | peer's threads:wait | ours faster | wanted |
|---|---|---|---|---|---|---|
$(speed_rows)

| peak memory | ours [MiB] | peer [MiB] | wanted |
|---|---|---|---|
$(memory_rows)

Mean completion length in the whole GRPO steps: ours $(cell whole.length), TRL's $(cell whole.peer.length) tokens.

Commands, DIR for a temporary directory; whole steps are those of \`make train\` and \`make step\`:

\`\`\`
$(sed "s|$WORK|DIR|g; s|^$PYTHON |python3 |" "$WORK/commands")
\`\`\`
EOF
}

# MiB that sampling 16 x 64 tokens of so many prompts may take: keys and values of prompts of at most 256 tokens once a prompt.
allowed() {
    awk -v weights="$weights" -v tokens=$(($1 * 256 + 16 * 64)) 'BEGIN { RS = "[,{}]" }
        { gsub(/[ "\n]/, ""); split($0, pair, ":"); config[pair[1]] = pair[2] }
        END { head = config["hidden_size"] / config["num_attention_heads"]
            kv = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * tokens / 1048576
            printf "%.0f", weights + kv + 300 }' "$LARGE/config.json"
}

cp /proc/loadavg "$WORK/load"
versions=$(package_versions)
[ -n "$versions" ] || say "$PYTHON lacks the packages of $peers/requirements.txt: only our side is measured"
measure_tiny
if [ -d "$LARGE" ]; then measure_large; else say "no ${LARGE:-LARGE}: the 0.5B shape is left out"; fi
report
