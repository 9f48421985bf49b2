# shellcheck shell=bash
# Sourced by gpu.sh: runs of `make train`, and what they learned.

# train_as NAME NUMBER=...: a run of its own, its words only when it fails.
train_as() {
    local name=$1
    shift
    rm -rf "runs/$name"
    # shellcheck disable=SC2086 # words of the form NAME=VALUE
    env -u RECIPE -u SEED -u MODEL -u PARTS "$@" $NUMBERS NAME="$name" bash pipelines/train.sh >"$WORK/$name.table" 2>"$WORK/$name.said" ||
        { tail -n 3 "$WORK/$name.said" >&2 && return 1; }
}

# reward RUN first|last: the mean over 20 steps, with 1.96 standard errors of it.
reward_of() {
    sed -n 's/.*"reward":\(-\{0,1\}[0-9.e-]*\).*/\1/p' "runs/$1/metrics.jsonl" | { [ "$2" = first ] && head -n 20 || tail -n 20; } |
        awk '{ n++; sum += $1; squares += $1 * $1 }
            END { mean = sum / n; rest = n > 1 ? (squares - n * mean * mean) / (n - 1) : 0
                printf "%.3f +- %.3f", mean, 1.96 * sqrt((rest > 0 ? rest : 0) / n) }'
}

# rate_of FILE NAME: a rate of an evaluation with its 95 % interval.
rate_of() {
    sed -n 's/.*"'"$2"'":{"value":\([0-9.e-]*\),"low":\([0-9.e-]*\),"high":\([0-9.e-]*\)}.*/\1 \2 \3/p' "$1" |
        awk '{ printf "%.1f %% (%.1f-%.1f)", 100 * $1, 100 * $2, 100 * $3 }'
}

part_precision() {
    local seed precision name began
    cat <<END

## 200 steps in ${PRECISIONS// / against }

The tiny recipe, from random weights to its supervised start and 200 GRPO steps, sampled and trained in that type. Reward: mean of the last 20
steps, with 1.96 standard errors over them; accuracy: greedy, on held-out problems, with its 95 % interval.

| seed | type | reward | accuracy | s |
|---|---|---|---|---|
END
    for seed in 1 2 3; do
        for precision in $PRECISIONS; do
            name=bench-$seed-$precision
            began=$SECONDS
            train_as "$name" RECIPE=tiny SEED="$seed" STEPS=200 DTYPE="$precision" || continue
            echo "| $seed | $precision | $(reward_of "$name" last) | $(rate_of "runs/$name/eval/after.greedy.json" accuracy_strict) | $((SECONDS - began)) |"
            rm -rf "runs/$name"
        done
    done
}

part_learn() {
    local name=bench-$LEARN began=$SECONDS kind rate
    train_as "$name" RECIPE="$LEARN" SEED=1 || return 0
    cat <<END

## A model that learns

\`make train RECIPE=$LEARN\`: from random weights to a supervised start and $(wc -l <"runs/$name/metrics.jsonl") GRPO steps in $((SECONDS - began)) s, evaluations included. 95 % intervals.

| $(wc -l <"runs/$name/eval/after.prompts.jsonl") held-out problems | before GRPO | after |
|---|---|---|
END
    for kind in greedy sampled; do
        for rate in accuracy_strict accuracy_flexible format_rate; do
            echo "| $kind: ${rate//_/ } | $(rate_of "runs/$name/eval/before.$kind.json" "$rate") |" \
                "$(rate_of "runs/$name/eval/after.$kind.json" "$rate") |"
        done
    done
    echo "| reward, 20 steps | $(reward_of "$name" first) | $(reward_of "$name" last) |"
    rm -rf "runs/$name"
}
