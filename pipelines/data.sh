#!/usr/bin/env bash
# A data set from QUESTIONS, what gsm8k-prep reads, by MODEL: N completions each, the right ones. The same command goes on where it was killed.
. "$(dirname "$0")/common.sh"
case ${QUESTIONS:+q}${MODEL:+m} in qm) ;; *) die "usage: make data QUESTIONS=file MODEL=... N=8" 2 ;; esac
name=${QUESTIONS##*/} system=$MODEL/system_prompt.txt
OUT=${OUT:-runs/data/${name%%.*}} && mkdir -p "$OUT"
[ ! -f "$system" ] || set -- --system-prompt "$system"
gsm8k-prep "$QUESTIONS" "$@" | rollout --model "$MODEL" -n "${N:-8}" --jsonl "$OUT/rollouts.jsonl"
score "$OUT/rollouts.jsonl" | export-hf - "$OUT"
