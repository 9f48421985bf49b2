# Rewards dealt to the wrong completions: each record of a step gets the reward of another, drawn by a seeded shuffle.
# A run that still improves has learned from something other than its rewards. Use: score | awk -v seed=N -f placebo.awk
{
    line[NR] = $0
    match($0, /"reward":[-0-9.e]+/)
    reward[NR] = substr($0, RSTART, RLENGTH)
}
END {
    srand(seed)
    for (i = NR; i > 1; i--) {
        j = int(rand() * i) + 1
        other = reward[i]; reward[i] = reward[j]; reward[j] = other
    }
    for (i = 1; i <= NR; i++) {
        sub(/"reward":[-0-9.e]+/, reward[i], line[i])
        print line[i]
    }
}
