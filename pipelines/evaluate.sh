#!/usr/bin/env bash
# Evaluates MODEL, a run's export, a directory or a Hub id, on held-out problems of DATA, with the numbers of RECIPE or else of its run.
. "$(dirname "$0")/common.sh"
[ -n "${MODEL:-}" ] || die "usage: make evaluate MODEL=... DATA=... RECIPE=..." 2
numbers=$(dirname "$MODEL")/recipe.env
[ -z "${RECIPE:-}" ] && [ -f "$numbers" ] || numbers=$(recipe_file "${RECIPE:-qwen2.5-0.5b}")
begin "runs/${NAME:-evaluate-${MODEL//\//-}}" --recipe "$numbers"
tell() { evaluate_as model "$MODEL"; evaluate "$RUN/eval/model.greedy.jsonl.zst"; evaluate "$RUN/eval/model.sampled.jsonl.zst"; }
run_as_group tell
