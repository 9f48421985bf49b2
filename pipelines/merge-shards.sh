#!/usr/bin/env bash
# merge-shards.sh N DIR: the N parts that sample-shard.sh made in DIR, one after the other: the same bytes as from one machine. If parts are
# missing, says which, in the form that `sbatch --array=` takes.
set -euo pipefail
{ [ $# = 2 ] && [ "$1" -gt 0 ]; } 2>/dev/null || { echo "usage: merge-shards.sh N DIR" >&2 && exit 2; }
parts=() missing=
for number in $(seq "$1"); do
    part=$2/part-$number-of-$1.jsonl
    [ -f "$part" ] || missing+=,$number
    parts+=("$part")
done
[ -z "$missing" ] || { echo "merge-shards.sh: of the $1 parts, $2 lacks ${missing#,}" >&2 && exit 1; }
cat "${parts[@]}"
