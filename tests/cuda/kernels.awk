# Prints what ptxas -v said as a table: registers per thread of each kernel on each GPU (+ bytes spilled), and its static shared memory.
# A spilled register goes through memory, at many times the cost: that fails, but for the few that ptxas gives up so that more blocks
# run at once. A warning fails too.
/warning/ { print; bad = 1 }
/Compiling entry function/ {
    split($0, quoted, "'")
    kernel = quoted[2]
    gpu = quoted[4]
    if (!(kernel in shared)) kernels[++rows] = kernel
    if (!(gpu in seen)) gpus[seen[gpu] = ++columns] = gpu
    shared[kernel] += 0
}
/bytes spill stores/ { for (i = 4; i <= NF; i++) if ($i == "spill") spilled[kernel, gpu] += $(i - 2) }
/Used [0-9]+ registers/ {
    for (i = 2; i <= NF; i++) {
        if ($i ~ /^registers/) registers[kernel, gpu] = $(i - 1)
        if ($i ~ /^smem/ && $(i - 2) + 0 > shared[kernel]) shared[kernel] = $(i - 2)
    }
}
END {
    for (r = 1; r <= rows; r++) {
        kernel = kernels[r]
        line = sprintf("%-40s%8d B", kernel, shared[kernel])
        for (c = 1; c <= columns; c++) {
            bytes = spilled[kernel, gpus[c]]
            line = line sprintf("  %s: %s", gpus[c], registers[kernel, gpus[c]] (bytes ? "+" bytes : ""))
            if (bytes > 64) { print kernel " spills " bytes " bytes on " gpus[c]; bad = 1 }
        }
        print line
    }
    if (!rows) print "no kernel in what ptxas said"
    exit bad || !rows
}
