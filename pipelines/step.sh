#!/usr/bin/env bash
# One iteration of GRPO by files: prompts -> rollouts -> rewards -> the next checkpoint -> the policy link. The same bytes as the
# resident pipe of train.sh makes. Killed at any instant, it is simply done again. Its metrics go to stdout, too.
. "$(dirname "$0")/common.sh"
choose_recipe
load_recipe
[ -L "$RUN/policy" ] || die "$RUN has no policy yet; 'make train' makes one" 2
pin_recipe

step=$(reached_step)
next=$((step + 1))
[ "$next" -le "$STEPS" ] || die "$RUN has done all of its $STEPS steps" 2
run_as_group train_one_step "$next"
