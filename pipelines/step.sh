#!/usr/bin/env bash
# One iteration of GRPO by files: prompts -> rollouts -> rewards -> the next checkpoint -> the policy link. The same bytes as the
# resident pipe of train.sh makes. Killed at any instant, it is simply done again. Its metrics go to stdout, too.
# Where sampling may be ahead of training, it is the pipe for one step: which weights a step is sampled from is then rollout --follow's to say.
. "$(dirname "$0")/common.sh"
choose_recipe
load_recipe
[ -L "$RUN/policy" ] || die "$RUN has no policy yet; 'make train' makes one" 2
pin_recipe

step=$(reached_step)
next=$((step + 1))
[ "$next" -le "$STEPS" ] || die "$RUN has done all of its $STEPS steps" 2
one_step_ahead() { train_steps <(head -n $(($(prompts_consumed "$RUN/policy") + PROMPTS_PER_STEP)) "$RUN/prompts.jsonl"); }
case $MAX_STALENESS in
0) run_as_group train_one_step "$next" ;;
*) run_as_group one_step_ahead ;;
esac
