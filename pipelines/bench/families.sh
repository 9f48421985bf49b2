# shellcheck shell=bash
# Sourced by run.sh: a step of the other recipes' shapes, with random weights and the tiny tokenizer.

FAMILIES="smollm2-135m qwen3-0.6b llama-3.2-1b qwen2.5-1.5b"

measure_families() {
    local name shape
    for name in $FAMILIES; do
        say "shape of $name"
        shape=$WORK/$name.shape
        mkdir "$shape"
        cp pipelines/recipes/tiny/tokenizer*.json "$shape"
        cp "tests/bench/shapes/$name.json" "$shape/config.json"
        random_model "$shape" "$WORK/$name"
        gsm8k-prep --generate 4 --max-number 10 -o "$WORK/$name.prompts"
        run rollout "$WORK/$name.prompts" --model "$WORK/$name" -n 4 --max-completion-tokens 64
        note "$name.sampling" "$(calculate "16 * 64 / $taken")"
        note "$name.sampling.peak" "${peak:-0}"
        made_up_rewards <"$WORK/output" >"$WORK/$name.scored"
        # All weights of 1.5B take 19 GB, and more while they are read and written.
        [ "$name" = qwen2.5-1.5b ] || measure_step "$name" training --optimizer-state bf16
        measure_step "$name" adapter --lora-rank 16
        rm -rf "${WORK:?}/$name"
    done
}

# measure_step NAME WHAT OPTION...
measure_step() {
    run grpo-step "$WORK/$1.scored" --policy "$WORK/$1" --out "$WORK/trained" --max-staleness any --weights-only "${@:3}"
    note "$1.$2" "$taken"
    note "$1.$2.peak" "${peak:-0}"
    rm -rf "$WORK/trained"
}

families_table() {
    local name
    measured smollm2-135m.training || return 0
    cat <<END

Other recipes' shapes, random weights: sampling 16 sequences (4 prompts x 4) of 64 tokens, and one GRPO step on them from start to end,
loading and writing included: of all weights, with moments in bf16, and of an adapter of rank 16.

| shape | sampling [tokens/s] | peak [MiB] | step [s] | peak [MiB] | adapter: step [s] | peak [MiB] |
|---|---|---|---|---|---|---|
END
    for name in $FAMILIES; do
        echo -n "| $name "
        for part in sampling training adapter; do echo -n "| $(cell "$name.$part") | $(cell "$name.$part.peak") "; done
        echo "|"
    done
}
