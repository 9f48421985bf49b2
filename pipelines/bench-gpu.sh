#!/usr/bin/env bash
# What sampling and training reach on a GPU: shares of the card's limits, and transformers at the same work in the same run. A Markdown report
# on stdout. PYTHON has torch and transformers, else only our side is measured; MODEL is a directory with config.json and tokenizer of
# the 0.5B shape, from which the peers get random weights. Needs no cargo: `make CUDA=1 bench-gpu` has built all.
. "$(dirname "$0")/common.sh"

PYTHON=${PYTHON:-python3}
MODEL=${MODEL-../shared/qwen2.5-0.5b-instruct}
export PEER_DEVICE=cuda OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} PYTHONDONTWRITEBYTECODE=1
mkdir -p target
WORK=$(mktemp -d target/bench.XXXXXX)
trap 'rm -rf "$WORK"' EXIT

declare -A ours
while read -r name value; do ours[$name]=$value; done < <(target/release/examples/bench-gpu)
[ -n "${ours[requests_limit_s]:-}" ] || die "the benchmark did not end; run target/release/examples/bench-gpu"
calculate() { awk "BEGIN { printf \"$1\", $2 }"; }

# peer SCRIPT ARGUMENT...: its number, or nothing when it cannot run here.
peer() {
    [ -d "$WORK/model" ] || return 0
    "$PYTHON" "tests/bench/peers/$1.py" "$WORK/model" "$WORK/prompts.jsonl" "${@:2}" 2>"$WORK/stderr" | tail -n 1 ||
        tail -n 3 "$WORK/stderr" >&2
}

if [ -f "$MODEL/config.json" ] && "$PYTHON" -c 'import torch, transformers' 2>/dev/null; then
    grpo-step --init --seed 1 --policy "$MODEL" --out "$WORK/model" --weights-only </dev/null >/dev/null
    rm -f "$WORK/model/generation_config.json"
    sed -i 's/"eos_token_id": *[0-9]*/"eos_token_id": 151935/' "$WORK/model/config.json"
    gsm8k-prep --generate 64 --seed 1 >"$WORK/prompts.jsonl"
fi
generate=$(peer generate --prompts 4 --generations 16 --new-tokens 200)
batched=$(peer generate_batch --prompts 4 --generations 16 --new-tokens 200)

row() { echo "| $1 | $2 | $3 | $4 |"; }
against() { [ -n "$2" ] && calculate '%.1fx of %.0f tokens/s' "$1 / $2, $2" || echo "not measured"; }
cat <<END
# Sampling and training on a GPU

$(date -u +%F), commit $(git describe --always --dirty 2>/dev/null || echo unknown), ${ours[gpu]//_/ }: ${ours[bandwidth_tb_s]} TB/s copied within the card,
${ours[bf16_tflop_s]} TFLOP/s in a bf16 product of 8192 x 8192 x 8192, both measured in this run. Shape of Qwen2.5-0.5B, random weights, bf16,
prompts of 110 tokens shared by 16 samples, lengths forced. Command: make CUDA=1 bench-gpu.

| | limit | reached | share |
|---|---|---|---|
END
for kind in decode invariant; do
    for rows in 1 16 64 512; do
        name=${kind}_$rows
        words=$([ $kind = decode ] && echo "decode step" || echo "the same with --batch-invariant")
        row "$words, $rows sequences, context 210" "${ours[${name}_limit_ms]} ms" "${ours[${name}_ms]} ms" \
            "$(calculate '%.0f %%' "100 * ${ours[${name}_limit_ms]} / ${ours[${name}_ms]}")"
    done
done
for prompts in 4 64; do
    row "prefill, $prompts prompts of 110 tokens" "" "${ours[prefill_${prompts}_ms]} ms" \
        "$(calculate '%.0f %% MFU' "100 * ${ours[prefill_${prompts}_mfu]}")"
done
tokens=$(calculate '%.0f' "${ours[requests_tokens]} / ${ours[requests_limit_s]}")
row "256 requests, inputs and outputs of 100 to 1,024 tokens" "$tokens tokens/s" "${ours[requests_tokens_s]} tokens/s" \
    "$(calculate '%.0f %%' "100 * ${ours[requests_tokens_s]} / $tokens")"
while read -r name words; do
    row "$words" "${ours[${name}_limit_ms]} ms" "${ours[${name}_ms]} ms" \
        "$(calculate '%.0f %%' "100 * ${ours[${name}_limit_ms]} / ${ours[${name}_ms]}")"
done <<END
train_each forward and backward, 64 x (110 + 150) tokens
train_once the same, the prompt once for 16 samples
train_1024 forward and backward, 32 x 1,024 tokens, every token learned (${ours[train_1024_tokens_s]} tokens/s)
adamw AdamW and the norm before it
END
cat <<END

| 64 sequences of 200 tokens, prompts included | tokens/s | ours against it |
|---|---|---|
| rollout's engine | ${ours[generate_64_tokens_s]} | |
| transformers generate | ${generate:-not measured} | $(against "${ours[generate_64_tokens_s]}" "$generate") |
| transformers generate_batch | ${batched:-not measured} | $(against "${ours[generate_64_tokens_s]}" "$batched") |
END
