# shellcheck shell=bash
# Sourced by run.sh: sampling from GGUF files of the 0.5B shape, against llama.cpp on the same files.

GGUF_TYPES="q8_0 q4_k"

measure_gguf() {
    local type out=$WORK/gguf
    echo '{"eos_token_id": 151643}' >"$WORK/large/generation_config.json" # GGUF wants one of the vocabulary; random weights seldom draw it
    for type in $GGUF_TYPES; do
        say "0.5B shape: GGUF, $type"
        export-hf "$WORK/large" "$out" --gguf "$type"
        cp "$out"/*-"$type".gguf "$WORK/$type.gguf"
        rm -rf "$out"
        for ((i = 1; i <= LARGE_REPEATS; i++)); do
            gguf_sampling "$type.one" 1 1 512
            gguf_sampling "$type.many" 16 1 64
        done
    done
}

# gguf_sampling NAME PROMPTS GENERATIONS TOKENS: tokens/s with loading, of both.
gguf_sampling() {
    local name=$1 file=$WORK/${1%.*}.gguf
    head -n "$2" "$WORK/large.prompts" >"$WORK/$name.jsonl"
    run rollout "$WORK/$name.jsonl" --model "$file" -n "$3" --max-completion-tokens "$4"
    note "$name" "$(calculate "$2 * $3 * $4 / $taken")"
    note "$name.peak" "${peak:-0}"
    peer "$name.peer" llama_gguf "$file" "$WORK/large.prompts" --prompts "$2" --new-tokens "$4"
}

gguf_rows() {
    local type
    for type in $GGUF_TYPES; do
        row "0.5B as GGUF, $type: 1 sequence, 512 tokens; llama.cpp" tokens/s "$type.one" 0.8x
        row "0.5B as GGUF, $type: 16 sequences of 16 prompts, 64 tokens; llama.cpp, one after the other" tokens/s "$type.many" 0.8x
    done
}
