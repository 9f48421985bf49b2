# Sourced by bench-gpu.sh: shares of the card's limits, and transformers' generate.

# peer_number SCRIPT ARGUMENT...: its number, or nothing when it cannot run here.
peer_number() {
    [ -d "$WORK/model" ] && "$PYTHON" -c 'import torch, transformers' 2>/dev/null || return 0
    "$PYTHON" "$peers/$1.py" "$WORK/model" "$WORK/prompts.jsonl" "${@:2}" 2>"$WORK/stderr" | tail -n 1 ||
        tail -n 3 "$WORK/stderr" >&2
}

format() { awk "BEGIN { printf \"$1\", $2 }"; }
limit_row() { echo "| $1 | $2 | $3 | $4 |"; }
share() { format '%.0f %%' "100 * ${ours[$1_limit_ms]} / ${ours[$1_ms]}"; }
against() { [ -n "$2" ] && format '%.1fx of %.0f tokens/s' "$1 / $2, $2" || echo "not measured"; }

part_speed() {
    local name value kind rows words tokens generate batched
    local -A ours
    while read -r name value; do ours[$name]=$value; done < <(target/release/examples/bench-gpu)
    [ -n "${ours[requests_limit_s]:-}" ] || die "the benchmark did not end; run target/release/examples/bench-gpu"
    generate=$(peer_number generate --prompts 4 --generations 16 --new-tokens 200)
    batched=$(peer_number generate_batch --prompts 4 --generations 16 --new-tokens 200)
    cat <<END

## Shares of the limits

${ours[bandwidth_tb_s]} TB/s copied within the card, ${ours[bf16_tflop_s]} TFLOP/s in a bf16 product of 8192 x 8192 x 8192, both measured in this run.
Shape of Qwen2.5-0.5B, random weights, bf16, prompts of 110 tokens shared by 16 samples, lengths forced.

| | limit | reached | share |
|---|---|---|---|
END
    for kind in decode invariant; do
        for rows in 1 16 64 512; do
            name=${kind}_$rows
            words=$([ $kind = decode ] && echo "decode step" || echo "the same with --batch-invariant")
            limit_row "$words, $rows sequences, context 210" "${ours[${name}_limit_ms]} ms" "${ours[${name}_ms]} ms" "$(share "$name")"
        done
    done
    for rows in 4 64; do
        limit_row "prefill, $rows prompts of 110 tokens" "" "${ours[prefill_${rows}_ms]} ms" \
            "$(format '%.0f %% MFU' "100 * ${ours[prefill_${rows}_mfu]}")"
    done
    tokens=$(format '%.0f' "${ours[requests_tokens]} / ${ours[requests_limit_s]}")
    limit_row "256 requests, inputs and outputs of 100 to 1,024 tokens" "$tokens tokens/s" "${ours[requests_tokens_s]} tokens/s" \
        "$(format '%.0f %%' "100 * ${ours[requests_tokens_s]} / $tokens")"
    while read -r name words; do
        limit_row "$words" "${ours[${name}_limit_ms]} ms" "${ours[${name}_ms]} ms" "$(share "$name")"
    done <<END
train_each forward and backward, 64 x (110 + 150) tokens
train_once the same, the prompt once for 16 samples
train_1024 forward and backward, 32 x 1,024 tokens, every token learned (${ours[train_1024_tokens_s]} tokens/s)
adamw AdamW and the norm before it
adamw_bf16 the same with moments in bf16
END
    cat <<END

| 64 sequences of 200 tokens, prompts included | tokens/s | ours against it |
|---|---|---|
| rollout's engine | ${ours[generate_64_tokens_s]} | |
| transformers generate | ${generate:-not measured} | $(against "${ours[generate_64_tokens_s]}" "$generate") |
| transformers generate_batch | ${batched:-not measured} | $(against "${ours[generate_64_tokens_s]}" "$batched") |
END
}
