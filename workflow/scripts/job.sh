# What the shell of every job begins with (workflow/rules/common/setup.smk): its own `tee` and `python`.

# Threads that wait for each other sleep instead of spinning: beside another program, each of their
# many small waits would cost a time slice.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

# By default glibc gives the memory of a large tensor back to the kernel as soon as it is free, and
# takes it anew, page by page, for the next: on a CPU that costs a forward a tenth of its time and
# more, by turns, so that even ratios of latencies are more of the heap than of the models.
: "${MALLOC_MMAP_THRESHOLD_:=33554432}" "${MALLOC_TRIM_THRESHOLD_:=1000000000}"
export MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_

# A scheduler's SIGTERM goes to all processes of a job: the shell waits for its program.
trap : TERM

# A log that can't be written must not fail a stage, whose results Snakemake would delete. The real
# tee says so once, on the screen, and goes on with what can be written; if nothing can, or it is
# killed, the program must still get rid of its words. It stays until a program that SIGTERM ended
# has had its say, and also when nobody reads the screen any more.
tee() {
    trap '' TERM PIPE
    command tee "$@" || cat 2> /dev/null || cat > /dev/null
}

# A program that a signal ends can't say so itself.
python() {
    local code=0
    trap : TERM # parts of a pipeline do not inherit the shell's
    # Bash's own message, on its stderr, would show the whole command.
    { command python "$@" 2>&3 3>&-; } 3>&2 2> /dev/null || code=$?
    if ((code > 128)); then
        command python "${BASH_SOURCE[0]%/*}/ppcl/runtime/endings.py" "$code" >&2 || true
    fi
    return "$code"
}
