#!/usr/bin/env bash
# A new run NAME from the checkpoint FROM (step_000100) of the run RUN: its past up to there, and its recipe but for the numbers that the
# environment sets. `make train NAME=...` goes on from it.
. "$(dirname "$0")/common.sh"
case /${RUN:-}/${FROM:-}/${NAME:-}/ in *//*) die "usage: make fork RUN=old FROM=step_000100 NAME=new NUMBER=..." 2 ;; esac
grpo-step --fork "runs/$RUN" --from "$FROM" --out "runs/$NAME"
