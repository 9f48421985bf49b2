#!/usr/bin/env bash
# Seconds per training step by ranks of one machine, against the formulas of docs/scaling.md. Needs `cargo build --release --features mpi` and
# mpirun. A Markdown report on stdout. SHAPE is of tests/bench/shapes; RANKS lists the numbers of ranks, of one thread each.
. "$(dirname "$0")/../common.sh"
. pipelines/bench/measure.sh

SHAPE=${SHAPE:-smollm2-135m} RANKS=${RANKS:-1 2 4} REPEATS=${REPEATS:-3} STEPS=4
export CUDA_VISIBLE_DEVICES= OMPI_MCA_orte_execute_quiet=1
[ -f "tests/bench/shapes/$SHAPE.json" ] || die "tests/bench/shapes has no SHAPE=$SHAPE" 2
command -v mpirun >/dev/null || die "mpirun is not installed" 2
mkdir -p target
WORK=$(mktemp -d target/bench.XXXXXX)
trap 'rm -rf "$WORK"' EXIT

mkdir "$WORK/samples" "$WORK/shape"
cp pipelines/recipes/tiny/tokenizer*.json "$WORK/shape"
cp "tests/bench/shapes/$SHAPE.json" "$WORK/shape/config.json"
random_model "$WORK/shape" "$WORK/model"
gsm8k-prep --generate $((4 * STEPS)) --max-number 10 -o "$WORK/prompts"
for tokens in 1 64; do
    rollout "$WORK/prompts" --model "$WORK/model" -n 4 --max-completion-tokens $tokens | made_up_rewards >"$WORK/$tokens.scored"
done

# seconds RANKS TOKENS: per step, after the first, which also allocates what the others use again.
seconds() {
    RAYON_NUM_THREADS=1 mpirun --oversubscribe --bind-to none -n "$1" -x RAYON_NUM_THREADS grpo-step "$WORK/$2.scored" --policy "$WORK/model" \
        --out "$WORK/next" --groups-per-step 4 --max-staleness any --weights-only 2>"$WORK/stderr" | perl -MTime::HiRes=time -ne '
            $first //= time; $last = time; $lines = $.; END { printf "%.3f\n", ($last - $first) / ($lines - 1) if $lines > 1 }' || return
    rm -rf "$WORK/next"
}
for ((i = 1; i <= REPEATS; i++)); do
    for ranks in $RANKS; do
        say "$i of $REPEATS: ranks: $ranks"
        for tokens in 1 64; do
            taken=$(seconds "$ranks" $tokens) || die "$(cat "$WORK/stderr")"
            note "$ranks.$tokens" "$taken"
        done
    done
done

cat <<END
# Ranks of one machine, $(date -u +%F)

$(nproc) cores, $(sed -n 's/^model name\s*: //p' /proc/cpuinfo | sort -u), $(mpirun --version | head -n 1), f32, one thread per rank.
$SHAPE with random weights, 4 groups of 4 completions per step; medians of $REPEATS runs of $((STEPS - 1)) steps, in seconds per step.

\`bash pipelines/bench/ranks.sh\`

* *short*: completions of 1 token, so that the step is the sum of gradients, the optimizer and the weights' way back.
* *long*: completions of 64 tokens.

| ranks | short | long | long - short |
|---|---|---|---|
END
for ranks in $RANKS; do
    short=$(median "$ranks.1") long=$(median "$ranks.64")
    printf '| %d | %.2f | %.2f | %.2f |\n' "$ranks" "$short" "$long" "$(calculate "$long - $short")"
done
