#!/usr/bin/env bash
# A stage in place of score: the five rewards, dealt to the wrong completions.
set -euo pipefail
cd "$(dirname "$0")"
# mawk waits for a whole block of input otherwise, and in a resident pipe the rest of it waits for the records that this stage holds.
at_once=()
case $(awk -W version 2>&1 </dev/null || true) in mawk*) at_once=(-W interactive) ;; esac
score | awk ${at_once[@]+"${at_once[@]}"} -v seed="${SEED:-1}" -f placebo.awk
