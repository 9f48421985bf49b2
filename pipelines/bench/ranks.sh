#!/usr/bin/env bash
# Seconds per training step by ranks of one machine, against the formulas of docs/scaling.md. Needs `cargo build --release --features mpi` and
# mpirun. A Markdown report on stdout. SHAPE is of tests/bench/shapes; RANKS lists the numbers of ranks, of one thread each.
. "$(dirname "$0")/../common.sh"

SHAPE=${SHAPE:-smollm2-135m} RANKS=${RANKS:-1 2 4} REPEATS=${REPEATS:-3} STEPS=4
export CUDA_VISIBLE_DEVICES= RAYON_NUM_THREADS=1
mkdir -p target
work=$(mktemp -d target/ranks.XXXXXX)
trap 'rm -rf "$work"' EXIT

mkdir "$work/shape"
cp pipelines/recipes/tiny/tokenizer*.json "$work/shape"
cp "tests/bench/shapes/$SHAPE.json" "$work/shape/config.json"
grpo-step --init --seed 1 --policy "$work/shape" --out "$work/model" --weights-only </dev/null
echo '{"eos_token_id": 999999999, "pad_token_id": 0}' >"$work/model/generation_config.json"
gsm8k-prep --generate $((4 * STEPS)) --max-number 10 -o "$work/prompts"
for tokens in 1 64; do
    RAYON_NUM_THREADS='' rollout "$work/prompts" --model "$work/model" -n 4 --max-completion-tokens $tokens |
        perl pipelines/bench/made-up-rewards.pl >"$work/$tokens.scored"
done

# seconds RANKS TOKENS: per step, after the first, which also makes what the others find.
seconds() {
    mpirun --oversubscribe --bind-to none -n "$1" -x RAYON_NUM_THREADS grpo-step "$work/$2.scored" --policy "$work/model" --out "$work/next" \
        --groups-per-step 4 --max-staleness any --weights-only 2>"$work/said" | perl -MTime::HiRes=time -ne '
            $first //= time; $last = time; $lines = $.; END { printf "%.3f\n", ($last - $first) / ($lines - 1) }' || return
    rm -rf "$work/next"
}
for ((i = 1; i <= REPEATS; i++)); do
    for ranks in $RANKS; do
        say "$i of $REPEATS: ranks: $ranks"
        for tokens in 1 64; do
            taken=$(seconds "$ranks" $tokens) || die "$(cat "$work/said")"
            echo "$ranks $tokens $taken"
        done
    done
done >"$work/seconds"

cat <<END
# Ranks of one machine, $(date -u +%F)

$(sed -n 's/^model name\s*: //p' /proc/cpuinfo | sort | uniq -c | awk '{ $1 = $1 " x"; print }'), $(mpirun --version | head -n 1), f32, one thread per rank.
$SHAPE with random weights, 4 groups of 4 completions per step; medians of $REPEATS runs of $((STEPS - 1)) steps, in seconds per step.

\`bash pipelines/bench/ranks.sh\`

* *short*: completions of 1 token, so that the step is the sum of gradients, the optimizer and the weights' way back.
* *long*: completions of 64 tokens.

| ranks | short | long | long - short |
|---|---|---|---|
END
sort -k1,1n -k2,2n -k3,3n "$work/seconds" | awk '
    { all[$1, $2, ++count[$1, $2]] = $3; if ($1 != last) order[++ranks] = last = $1 }
    function median(rank, tokens) { return all[rank, tokens, int((count[rank, tokens] + 1) / 2)] }
    END { for (i = 1; i <= ranks; i++) { rank = order[i]; short = median(rank, 1); long = median(rank, 64)
        printf "| %d | %.2f | %.2f | %.2f |\n", rank, short, long, long - short } }'
