# shellcheck shell=bash
# Sourced by gpu.sh: shares of the card's limits, and transformers' generate.

SPEED=${SPEED-decode generate prefill train adamw handover invariant requests kernels train-kernels} # parts of bench-gpu; decode=1,64 takes those rows
SPEED_PEERS=${SPEED_PEERS-generate generate_batch}
PEER_TIMES=${PEER_TIMES:-3}      # runs that count
PART_SECONDS=${PART_SECONDS:-90} # that a part, or a peer, may take

# peer_number SCRIPT ARGUMENT...: its number, the last one it came to when its time was up, or nothing when it cannot run here.
peer_number() {
    case " $SPEED_PEERS " in *" $1 "*) ;; *) return 0 ;; esac
    [ -d "$WORK/model" ] && "$PYTHON" -c 'import torch, transformers' 2>/dev/null || return 0
    timeout -k 5 "$PART_SECONDS" "$PYTHON" "$peers/$1.py" "$WORK/model" "$WORK/prompts.jsonl" --times "$PEER_TIMES" "${@:2}" 2>"$WORK/stderr" |
        tail -n 1 || tail -n 3 "$WORK/stderr" >&2
}

format() { awk "BEGIN { printf \"$1\", $2 }"; }
limit_row() { echo "| $1 | $2 | $3 | $4 |"; }
against() { [ -n "$1" ] && [ -n "$2" ] && format '%.1fx of %.0f tokens/s' "$1 / $2, $2" || echo "not measured"; }

# What a number of bench-gpu is of; nothing for one that has no row of its own.
words() {
    local rows=${1#*_}
    case $1 in
    decode_*) echo "decode step, $rows sequences, context 210" ;;
    invariant_*) echo "the same with --batch-invariant, $rows sequences" ;;
    prefill_*) echo "prefill, $rows prompts of 110 tokens" ;;
    train_each) echo "forward and backward, 64 x (110 + 150) tokens" ;;
    train_once) echo "the same, the prompt once for 16 samples" ;;
    train_1024) echo "forward and backward, 32 x 1,024 tokens, every token learned (${ours[train_1024_tokens_s]:-} tokens/s)" ;;
    adamw) echo "AdamW and the norm before it" ;;
    adamw_bf16) echo "the same with moments in bf16" ;;
    handover) echo "weights from trainer to sampler within the card" ;;
    esac
}

# part_numbers PART: its lines, told as they come. A process of its own: after an error of the device nothing works in that process.
part_numbers() {
    timeout -k 5 "$PART_SECONDS" target/release/examples/bench-gpu "$1" 2>"$WORK/bench.stderr" | tee >(cat >&2) ||
        { echo "failed $?" && tail -n 5 "$WORK/bench.stderr" >&2; }
}

# take_numbers PART: into `ours`, a row as soon as its number is there; what stands in the way of the rest is its last row.
take_numbers() {
    local name value limit what
    while read -r name value; do
        case $name in
        gpu | part | bandwidth_tb_s | bf16_tflop_s) [ -n "${ours[$name]:-}" ] || ours[$name]=$value ;;
        failed) limit_row "$1, or the rest of it" "" "not measured" "" ;;
        *) ours[$name]=$value ;;
        esac
        what=$(words "${name%_ms}")
        limit=${ours[${name%_ms}_limit_ms]:-}
        case $name in
        *_limit_ms) ;;
        *_ms) [ -z "$what" ] || limit_row "$what" "$limit ms" "$value ms" "$(format '%.0f %%' "100 * $limit / $value")" ;;
        requests_tokens_s)
            limit=$(format '%.0f' "${ours[requests_tokens]} / ${ours[requests_limit_s]}")
            limit_row "256 requests, inputs and outputs of 100 to 1,024 tokens" "$limit tokens/s" "$value tokens/s" \
                "$(format '%.0f %%' "100 * $value / $limit")"
            ;;
        esac
        case $name in *_us) kernels+=("$name") ;; esac
    done < <(part_numbers "$1")
}

# Each kind of launch alone, and what all of a step or pass take together.
kernel_rows() {
    local name
    [ "${#kernels[@]}" -gt 0 ] || return 0
    printf '\n| launches, each alone [us] | limit | reached | share |\n|---|---|---|---|\n'
    for name in "${kernels[@]}"; do
        case $name in *_limit_us) continue ;; esac
        name=${name%_us}
        limit_row "${name//_/ }" "${ours[${name}_limit_us]}" "${ours[${name}_us]}" \
            "$(format '%.0f %%' "100 * ${ours[${name}_limit_us]} / ${ours[${name}_us]}")"
    done
    for name in "${!ours[@]}"; do
        case $name in *_sum_ms) limit_row "${name//_/ }" "" "${ours[$name]}" "" ;; esac
    done
}

part_speed() {
    local part peer
    local -A ours=()
    local -a kernels=()
    cat <<END

## Shares of the limits

Shape of Qwen2.5-0.5B, random weights, bf16, prompts of 110 tokens shared by 16 samples, lengths forced.

| | limit | reached | share |
|---|---|---|---|
END
    for part in $SPEED; do take_numbers "$part"; done
    cat <<END

The limits are of ${ours[bandwidth_tb_s]:-unknown} TB/s copied within the card and ${ours[bf16_tflop_s]:-unknown} TFLOP/s in a bf16 product of 8192 x 8192 x 8192,
both measured in this run.
END
    kernel_rows
    cat <<END

| 64 sequences of 200 tokens, prompts included | tokens/s | ours against it |
|---|---|---|
| rollout's engine | ${ours[generate_64_tokens_s]:-not measured} | |
END
    for part in generate generate_batch; do
        peer=$(peer_number $part --prompts 4 --generations 16 --new-tokens 200)
        echo "| transformers $part | ${peer:-not measured} | $(against "${ours[generate_64_tokens_s]:-}" "$peer") |"
    done
}
