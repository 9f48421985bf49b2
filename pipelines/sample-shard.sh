#!/usr/bin/env bash
# sample-shard.sh I N PROMPTS DIR ARGUMENT...: the I-th of N parts of PROMPTS, sampled by `rollout ARGUMENT...` into DIR, where it appears when
# it is whole. A part that is there is not sampled again.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
export PATH="$here/../target/release:$here/../../../bin:$PATH" # of a clone, or of an installation
[ $# -ge 4 ] || { echo "usage: sample-shard.sh I N PROMPTS DIR ARGUMENT..." >&2 && exit 2; }
part=$4/part-$1-of-$2.jsonl
mkdir -p "$4"
[ -f "$part" ] || rollout "$3" --shard "$1/$2" -o "$part" "${@:5}"
