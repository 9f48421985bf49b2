#!/usr/bin/env bash
# The tables of docs/scaling.md: what a step of the reference job should take on more machines. A model, not a measurement: its inputs are
# the numbers below, measured where a file of tests/bench/results/ is named, and assumed where not.
set -euo pipefail

# Bandwidths are in GB/s, times in seconds; parameters are f32, in GB, as gradients and weights that are handed over.
awk '
# 2026-11-27-h100.md: one H100, bf16, 4 prompts of 110 tokens, 16 completions of 150 tokens each
function gpus() {
    name = "GPUs"; tokens = 150; prefill = 0.0022
    split("1 16 64 512", rows); split("0.000743 0.000948 0.001078 0.002385", decode) # a step of so many sequences
    training = 0.0746; update = 0.0063; copy = 0.00066
    host = 8; inside = 300; between = 40; memory = 10; files = 2 # assumed
}
# 2026-11-29-bf16.md: a server of two cores with AMX, bf16, 4 prompts of 100 tokens, 16 completions of 200 tokens each
function servers() {
    name = "servers"; tokens = 0; prefill = 21.6
    training = 61.6; update = 0; copy = 0.2
    host = 1; inside = 1; between = 1.1; memory = 1; files = 1 # assumed: Ethernet of 10 Gb/s
}
# A decode step of so many sequences: between the measured ones on a line, beyond them on the last one.
function step_of(sequences,    i) {
    for (i = 2; i < 4 && sequences > rows[i]; i++);
    return decode[i - 1] + (decode[i] - decode[i - 1]) * (sequences - rows[i - 1]) / (rows[i] - rows[i - 1])
}
function sampling(groups) { return tokens ? prefill * groups / 4 + tokens * step_of(16 * groups) : prefill * groups / 4 }
# A ring passes each gradient on twice, at the speed of its slowest link.
function sum_of(ranks) { return 2 * (ranks - 1) / ranks * parameters / (ranks > host ? between : inside) }
# Written once and read once: in memory on one host, else as files.
function hand_over(machines) { return machines == 1 ? copy : 2 * parameters / (machines > host ? files : memory) }
function ceiling(x) { return x == int(x) ? x : int(x) + 1 }
function learning(groups, ranks) { return ceiling(groups / ranks) / 4 * training + update / ranks + sum_of(ranks) }
function max(a, b) { return a > b ? a : b }
function short(seconds) { return sprintf(seconds < 10 ? "%.2f" : "%.0f", seconds) }
function row(machines,    ranks, s, l, h, all, alone, step) {
    ranks = max(machines - 1, 1)
    s = sampling(4); l = learning(4, ranks < 4 ? ranks : 4); h = hand_over(machines) # a rank takes whole groups
    alone = sampling(4) + learning(4, 1) + copy
    all = sampling(4) + learning(4 * machines, machines) + (machines == 1 ? copy : parameters / (machines > host ? between : inside))
    step = sampling(4 * ranks) + learning(4 * ranks, ranks) + h
    printf "| %d | %s | %s | %s | %s | %s | %s | %.0f %% | %s | %.0f %% |\n", machines, short(s), short(l), short(h), short(s + l + h),
        machines == 1 ? "-" : short(max(s, l + h)), short(step), 100 * alone * ranks / machines / step, short(all), 100 * alone / all
}
function table(last,    machines) {
    printf "| %s | sampling | training | hand-over | **step** | one step ahead | **4 groups per rank** | of ideal | **sampling on all** | of ideal |\n", name
    print "|---|---|---|---|---|---|---|---|---|---|"
    for (machines = 1; machines <= last; machines *= (machines < 16 || last < 100 ? 2 : 4)) row(machines)
}
BEGIN { parameters = 4 * 0.494; gpus(); table(1024); print ""; servers(); table(64) }'
