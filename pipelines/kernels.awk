# What ptxas -v said, as a table: registers a thread of each kernel on each card, and its static shared memory. A register that does
# not fit is spilled to memory, at many times the cost: that fails, as a warning does, but for the few that ptxas gives up so that
# more blocks run at once.

BEGIN { FEW = 64 } # bytes stored and loaded a thread

/Compiling entry function/ {
    split($0, quoted, "'")
    kernel = quoted[2]
    card = quoted[4]
    if (!(kernel in shared)) kernels[++rows] = kernel
    if (!(card in seen)) { seen[card] = 1; cards[++columns] = card }
    shared[kernel] += 0
}
/bytes spill stores/ {
    for (i = 4; i <= NF; i++) if ($i == "spill") spilled[kernel, card] += $(i - 2)
}
/Used [0-9]+ registers/ {
    for (i = 2; i <= NF; i++) {
        if ($i ~ /^registers/) registers[kernel, card] = $(i - 1)
        if ($i ~ /^smem/ && $(i - 2) + 0 > shared[kernel]) shared[kernel] = $(i - 2)
    }
}
/warning/ { print; bad = 1 }

END {
    if (!rows) { print "no kernel in what ptxas said"; exit 1 }
    printf "%-40s", "registers a thread"
    for (c = 1; c <= columns; c++) printf "%8s", cards[c]
    print "  static shared memory (+ bytes spilled)"
    for (r = 1; r <= rows; r++) {
        kernel = kernels[r]
        printf "%-40s", kernel
        for (c = 1; c <= columns; c++) printf "%8s", registers[kernel, cards[c]] (spilled[kernel, cards[c]] ? "+" spilled[kernel, cards[c]] : "")
        print "  " shared[kernel] " B"
        for (c = 1; c <= columns; c++)
            if (spilled[kernel, cards[c]] > FEW) { print kernel " spills " spilled[kernel, cards[c]] " bytes on " cards[c]; bad = 1 }
    }
    exit bad
}
