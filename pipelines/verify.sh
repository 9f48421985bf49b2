#!/usr/bin/env bash
# Proves a stretch of a run from its checkpoint FROM (step_000100) to its checkpoint TO: trains the recorded rollouts again, and compares
# weights and moments byte for byte; samples the first step again, and compares its records.
. "$(dirname "$0")/common.sh"
case /${RUN:-}/${FROM:-}/${TO:-}/ in *//*) die "usage: make verify RUN=name FROM=step_000100 TO=step_000200" 2 ;; esac
begin "runs/$RUN"
from=$RUN/checkpoints/$FROM to=$RUN/checkpoints/$TO work=$RUN/.verify
for checkpoint in "$from" "$to"; do [ -f "$checkpoint/state.json" ] || die "$checkpoint is no checkpoint that training made" 2; done
first=$((10#${FROM#step_} + 1)) last=$((10#${TO#step_}))
trap 'rm -rf "$work"' EXIT
rm -rf "$work" && mkdir "$work"

records_of() { printf "$RUN/rollouts/step_%06d.jsonl.zst" "$1"; }

# Differs only if weights, prompts, seed or recipe are others than those that sampled. `score` gives both sides their rewards.
if [ "$MAX_STALENESS" = 0 ] && [ -z "$SCORER" ]; then
    say "sampling step $first again"
    score --reward "$REWARDS" "$(records_of "$first")" >"$work/recorded"
    begun=$(((first - 1) * PROMPTS_PER_STEP * ${DYNAMIC_SAMPLING:-1})) groups=$(($(wc -l <"$work/recorded") / NUM_GENERATIONS))
    sed -n "$((begun + 1)),$((begun + groups))p" "$RUN/prompts.jsonl" >"$work/prompts.jsonl"
    (sample "$work/prompts.jsonl" --model "$from") | score --reward "$REWARDS" >"$work/again"
    cmp "$work/again" "$work/recorded" >&2 || die "$(records_of "$first") is not what the weights of $from sample" 4
fi

say "training steps $first to $last again"
for step in $(seq "$first" "$last"); do cat "$(records_of "$step")"; done >"$work/records.jsonl.zst"
(train_on "$work/records.jsonl.zst" --policy "$from" --out "$work/policy" >/dev/null) || exit
for file in model.safetensors adapter_model.safetensors optimizer.safetensors; do
    [ ! -f "$work/policy/$file" ] || cmp "$work/policy/$file" "$to/$file" >&2 || die "$to/$file is not what the recorded rollouts train" 4
done
echo "$RUN: the recorded rollouts of steps $first to $last train $FROM to $TO, byte for byte"
