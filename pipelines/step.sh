#!/usr/bin/env bash
# One iteration of GRPO on a run that train.sh began: its pipe for one step, with the same bytes in every file. Killed at any instant, it
# is simply done again. Its metrics go to stdout, too.
. "$(dirname "$0")/common.sh"
begin_run
[ -L "$RUN/policy" ] || die "$RUN has no policy yet; 'make train' makes one" 2
step=$(reached_step)
[ "$step" -lt "$STEPS" ] || die "$RUN has done all of its $STEPS steps" 2
run_as_group train_steps --steps 1
