#!/usr/bin/env bash
# What sampling and training reach on a GPU: shares of the card's limits, transformers and TRL at the same work in the same run, and what a
# model learns in minutes. A Markdown report on stdout. PYTHON has the packages of tests/bench/peers/requirements.txt; a peer that it lacks
# is left out. MODEL is a directory with config.json and tokenizer of the 0.5B shape, which gets random weights. Needs no cargo:
# `make CUDA=1 bench-gpu` has built all.
. "$(dirname "$0")/../common.sh"
for part in measure report gpu-speed gpu-step gpu-learn; do . "pipelines/bench/$part.sh"; done

PYTHON=${PYTHON:-python3}
MODEL=${MODEL-../shared/qwen2.5-0.5b-instruct}
PARTS=${PARTS:-speed step precision learn}  # each a section of the report
NEW_TOKENS=${NEW_TOKENS:-150}               # of a completion in the step against TRL's
PRECISIONS=${PRECISIONS:-f32 bf16}          # that 200 steps of the tiny recipe are compared in
LEARN=${LEARN:-from-scratch}                # recipe of the learning run
NUMBERS=${NUMBERS:-}                        # numbers of the learning runs set otherwise, like STEPS=2: to try this script
export PEER_DEVICE=${PEER_DEVICE:-cuda} OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} PYTHONDONTWRITEBYTECODE=1
peers=tests/bench/peers
mkdir -p target
WORK=$(mktemp -d target/bench.XXXXXX)
trap 'rm -rf "$WORK"' EXIT

if [ -f "$MODEL/config.json" ]; then
    random_model "$MODEL" "$WORK/model"
    gsm8k-prep --generate 64 --seed 1 >"$WORK/prompts.jsonl"
else
    say "no ${MODEL:-MODEL}: the peers and the step are left out"
fi

card() {
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1 || echo "no NVIDIA GPU"
}

echo "# Sampling and training on a GPU"
echo
echo "$(date -u +%F), commit ${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}, $(card). Command: make CUDA=1 bench-gpu."
failed=0
for part in $PARTS; do
    say "part: $part"
    # Not with ||, after which a part would go on where it fails.
    set +e
    (
        set -e
        "part_$part"
    )
    code=$?
    set -e
    [ "$code" -eq 0 ] || { failed=1 && say "part $part failed"; }
done
exit "$failed"
