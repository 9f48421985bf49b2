# Rewards dealt to the wrong completions: each record gets the reward of another of its group, drawn by a seeded shuffle. A group
# leaves as soon as it is whole, and its shuffle depends on the seed and the group alone, so that a run can be interrupted.
# A run that still improves has learned from something other than its rewards. Use: score | awk -v seed=N -f placebo.awk
function text(field) {
    match($0, "\"" field "\":\"[^\"]*\"")
    return substr($0, RSTART, RLENGTH)
}
function hash(words,    at, sum) {
    for (at = 1; at <= length(words); at++) sum = (sum * 31 + index(letters, substr(words, at, 1))) % 1000003
    return sum
}
BEGIN { letters = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ/:-_." }
{
    line[++count] = $0
    match($0, /"reward":[-0-9.e]+/)
    reward[count] = substr($0, RSTART, RLENGTH)
    match($0, /"group_size":[0-9]+/)
    if (count < substr($0, RSTART + 13, RLENGTH - 13) + 0) next
    srand(seed * 1000003 + hash(text("group_id")))
    for (i = count; i > 1; i--) {
        j = int(rand() * i) + 1
        other = reward[i]; reward[i] = reward[j]; reward[j] = other
    }
    for (i = 1; i <= count; i++) {
        sub(/"reward":[-0-9.e]+/, reward[i], line[i])
        print line[i]
    }
    fflush()
    count = 0
}
