#!/usr/bin/env bash
# awk as a stage of a resident pipe. mawk waits for a whole block of input otherwise, and the rest of it waits for the records that this
# stage holds.
by_line=()
case $(awk -W version 2>&1 </dev/null || true) in mawk*) by_line=(-W interactive) ;; esac
exec awk ${by_line[@]+"${by_line[@]}"} "$@"
