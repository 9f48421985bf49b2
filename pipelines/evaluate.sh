#!/usr/bin/env bash
# evaluate.sh MODEL OUT: greedy and sampled accuracy on the held-out problems, to OUT.greedy.json and OUT.sampled.json.
. "$(dirname "$0")/common.sh"
choose_recipe
load_recipe
[ $# -eq 2 ] || die "usage: evaluate.sh MODEL OUT" 2
model=$1 out=$2

prepare test "$TEST_PROMPTS" >"$out.prompts.jsonl"
measure() {
    local kind=$1
    shift
    sample "$out.prompts.jsonl" --model "$model" --on-long-prompt truncate-left "$@" 2>"$out.$kind.log" |
        score -o "$out.$kind.jsonl.zst" || {
        end_if_wished $?
        cat "$out.$kind.log" >&2
        die "evaluation of $model failed"
    }
    evaluate "$out.$kind.jsonl.zst" --json -o "$out.$kind.json"
}
measure greedy --temperature 0
measure sampled --temperature 1 -n "$TEST_SAMPLES"
