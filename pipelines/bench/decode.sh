# shellcheck shell=bash
# Sourced by run.sh: how much of the memory's speed a decode step of the 0.5B shape reaches, and llama.cpp on the same weights.

measure_decode() {
    local settings="$THREADS:active $THREADS:passive" dtype dir sequences name value
    for ((i = 1; i <= DECODE_REPEATS; i++)); do
        say "0.5B shape, decode steps: $i of $DECODE_REPEATS"
        run cargo bench -q --bench decode -- "$model" "$model.bf16" 5
        while read -r name value; do note "decode_$name" "$value"; done <"$WORK/output"
        for dtype in f32 bf16; do
            dir=$model
            [ $dtype = f32 ] || dir=$model.bf16
            for sequences in 1 16; do
                peer "decode_${dtype}_$sequences.peer" llama "$dir" "$WORK/$dtype.gguf" --sequences $sequences --context 110 --steps 10
            done
        done
    done
}

# share NAME: its best sample, and what part that is of the memory's best one.
share() {
    measured "$1" || { echo '- | -' && return; }
    awk -v a="$(largest "$1")" -v b="$(largest decode_memory)" 'BEGIN { printf "%.1f | %.0f %%", a, 100 * a / b }'
}

# decode_row WHAT NAME WANTED
decode_row() { echo "| $1 | $(share "$2") | $(share "$2.peer") | $(cat "$WORK/$2.peer.setting" 2>/dev/null || echo -) | $3 |"; }

decode_table() {
    measured decode_memory || return 0
    cat <<EOF

Decode steps of the 0.5B shape after a prompt of 110 tokens: weights over the time of a step. Ours with the draw of the tokens,
llama.cpp without. A plain read of 1 GiB on $THREADS threads: $(printf %.1f "$(largest decode_memory)") GB/s. The best of all samples, which take turns:
what else runs on the machine can only make a sample slower.

| decode step | ours [GB/s] | of the memory's speed | llama.cpp [GB/s] | of the memory's speed | its threads:wait | wanted of ours |
|---|---|---|---|---|---|---|
$(decode_row 'f32, 1 sequence' decode_f32_1 '75 %')
$(decode_row 'f32, 16 sequences' decode_f32_16 '40 %')
$(decode_row 'bf16, 1 sequence' decode_bf16_1 '75 %')
$(decode_row 'bf16, 16 sequences' decode_bf16_16 '40 %')
EOF
}
