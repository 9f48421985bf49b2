#!/usr/bin/env bash
# A new run NAME from the checkpoint FROM (step_000100) of the run RUN: its past up to there, and its recipe but for the numbers that the
# environment sets. `make train NAME=...` goes on from it.
. "$(dirname "$0")/common.sh"
old=runs/${RUN:-} from=${FROM:-}
new=runs/${NAME:-}
[ -n "${RUN:-}" ] && [ -n "$from" ] && [ -n "${NAME:-}" ] || die "usage: make fork RUN=old FROM=step_000100 NAME=new NUMBER=..." 2
[ -f "$old/recipe.env" ] || die "no run $old" 2
[ -d "$old/checkpoints/$from" ] || die "$old has no checkpoint $from; there are: $(ls "$old/checkpoints" | paste -s -d ' ' -)" 2
[ ! -e "$new" ] || die "$new exists already; give the fork another NAME" 2
step=$(step_in "$from") || die "$from is no step_NUMBER" 2

recipe_names=()
read_numbers "$old/recipe.env"
FORK=$RUN/$from
[ "${recipe_names[0]}" = FORK ] || recipe_names=(FORK "${recipe_names[@]}")
[ "$step" -lt "$STEPS" ] || die "STEPS=$STEPS: nothing is left to do after $from" 2

# The prompts that are left decide how many steps follow.
consumed=$(prompts_consumed "$old/checkpoints/$from")
wanted=$((consumed + (STEPS - step) * PROMPTS_PER_STEP))
there=$(wc -l <"$old/prompts.jsonl")
[ "$wanted" -le "$there" ] || die "STEPS=$STEPS take $wanted prompts, and $old has $((there))" 2

RUN=runs/.$NAME.tmp
rm -rf "$RUN"
pin_recipe
head -n "$wanted" "$old/prompts.jsonl" >"$RUN/prompts.jsonl"
for file in "$old"/checkpoints/step_* "$old"/rollouts/step_*; do
    number=$(step_in "${file##*/}") || continue
    [ "$number" -gt "$step" ] || cp -R "$file" "$RUN/${file#"$old/"}"
done
[ ! -f "$old/metrics.jsonl" ] || awk -v last="$step" 'match($0, /"policy_step":[0-9]+/) && substr($0, RSTART + 14, RLENGTH - 14) + 0 <= last' \
    "$old/metrics.jsonl" >"$RUN/metrics.jsonl"
for file in "$old"/supervised.jsonl "$old"/eval/before.*; do
    [ ! -f "$file" ] || cp "$file" "$RUN/${file#"$old/"}"
done
point_policy_at "$from"
mv "$RUN" "$new"
say "$new: a fork of $old at $from; 'make train NAME=$NAME' goes on from there"
