# shellcheck shell=bash
# Sourced by run.sh: samples as tables.

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

# split_line WANTED: see split_of_step.
split_line() {
    echo "of a whole GRPO step in one pipe $(cell split.sampling) % is sampling, $(cell split.training) % training, $(cell split.weights) % takes the weights" \
        "from one to the other, and $(cell split.rest) % is all else (wanted: at most $1 %)."
}

speed_rows() {
    row 'tiny: sampling, 64 sequences (4 prompts x 16), 48 tokens; `generate`' tokens/s tiny_sampling 3x
    row 'tiny: training step, 64 sequences; plain PyTorch' s tiny_training 2x
    row "tiny: whole GRPO step, $PROMPTS_PER_STEP prompts x $NUM_GENERATIONS; TRL" s whole 5x
    row "tiny: the same by files, each command started anew" s by_files -
    row '0.5B: sampling, 16 sequences of 1 prompt, 64 tokens; `generate`' tokens/s large_group 2x
    row '0.5B: sampling, 16 sequences of 16 prompts, 64 tokens; `generate`' tokens/s large_prompts 2x
    row '0.5B: training step, 4 x 220 tokens; plain PyTorch' s large_training 1x
    row '0.5B in bf16: 16 prompts of 110 tokens, 1 token each; `generate`' tokens/s bf16_prefill -
    row '0.5B in bf16: sampling, 16 sequences of 1 prompt, 64 tokens; `generate`' tokens/s bf16_group 2x
    row '0.5B in bf16: sampling, 16 sequences of 16 prompts, 64 tokens; `generate`' tokens/s bf16_prompts 2x
    row '0.5B in bf16: training step, 4 x 220 tokens; PyTorch under autocast' s bf16_training 3x
    gguf_rows
    row '`score`; the five functions in Python' records/s score '200,000 records/s'
}

memory_rows() {
    memory_row 'tiny: sampling' tiny_sampling -
    memory_row 'tiny: training step' tiny_training -
    memory_row '`score`' score -
    [ "$weights" != 0 ] || return 0
    memory_row '0.5B: sampling, 1 prompt' large_group "$(allowed 1) (weights + KV + 300)"
    memory_row '0.5B: sampling, 16 prompts' large_prompts "$(allowed 16) (weights + KV + 300)"
    memory_row '0.5B: sampling, 1 prompt, bf16' bf16_group "$(allowed 1 0.5) (weights + KV + 300)"
    memory_row '0.5B: training step' large_training 10240
    memory_row '0.5B: training step, bf16' bf16_training 11264
}

report() {
    local model memory
    model=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)
    memory=$(awk '/^MemTotal/ { printf "%.0f GiB", $2 / 1048576 }' /proc/meminfo)
    cat <<EOF
# Benchmark on the CPU, $(date -u +%F)

$model, $(nproc) cores, $memory; $(uname -sr); load $(cut -d ' ' -f 1 <"$WORK/load") before the run.
Commit $(git rev-parse --short HEAD)$(git diff --quiet HEAD || echo ' with changes'), $(rustc --version | cut -d ' ' -f 1,2).
Peers: ${versions:-no transformers}; ${llama:-no llama.cpp}.
f32 where nothing else is said; ours on $THREADS threads, each peer on the fastest of $settings (threads:OMP_WAIT_POLICY; 0.5B: $THREADS:passive). Median (smallest-largest) of $REPEATS runs, of $LARGE_REPEATS for the 0.5B shape; the sides take turns.
Ours are whole processes, start, loading and writing included, but for the training steps; the peers' import, loading and first calls
are not counted.

| what | unit | ours | peer | peer's threads:wait | ours faster | wanted |
|---|---|---|---|---|---|---|
$(speed_rows)

Tiny shape: $(split_line 15)
$(decode_table)
$(families_table)

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
