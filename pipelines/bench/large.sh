# shellcheck shell=bash
# Sourced by run.sh: the 0.5B shape.

measure_large() {
    local model=$WORK/large prompt settings=$THREADS:passive
    say "0.5B shape: making what is measured on"
    random_model "$LARGE" "$model"
    export-hf "$model" "$model.bf16" --dtype bf16
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
        in_bf16
    done
    measure_decode
    measure_gguf
    weights=$(calculate "$(stat -c %s "$model/model.safetensors") / 1048576")
}

in_bf16() {
    local dtype=bf16
    ln -sf large.prompts "$model.bf16.prompts"
    sampling bf16_prefill "$model.bf16" 16 1 1 1
    sampling bf16_group "$model.bf16" 1 16 64 1
    sampling bf16_prompts "$model.bf16" 16 1 64 1
    training bf16_training "$model" 1 3 2
}

# allowed PROMPTS [PART]: MiB that sampling 16 x 64 tokens may take with so large a part of the weights: keys and values of prompts of at most 256 tokens once a prompt.
allowed() {
    awk -v weights="$weights" -v part="${2:-1}" -v tokens=$(($1 * 256 + 16 * 64)) 'BEGIN { RS = "[,{}]" }
        { gsub(/[ "\n]/, ""); split($0, pair, ":"); config[pair[1]] = pair[2] }
        END { head = config["hidden_size"] / config["num_attention_heads"]
            kv = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * tokens / 1048576
            printf "%.0f", part * weights + kv + 300 }' "$LARGE/config.json"
}
