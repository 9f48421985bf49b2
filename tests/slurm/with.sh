#!/usr/bin/env bash
# with.sh DIR COMMAND...: runs a command beside a Slurm of two nodes on this machine, with all of Slurm's files in DIR, and ends both. The
# nodes n1 and n2 have names and memory file systems (/dev/shm) of their own, as two machines do, and share the disk. Needs root.
set -euo pipefail
dir=$1 && shift
export SLURM_CONF=$dir/slurm.conf
mkdir -p "$dir/state"
umask 022

# Ports that nobody has: the first of three in a row.
port=$((20000 + RANDOM % 10000))
while (for i in 0 1 2; do : <"/dev/tcp/127.0.0.1/$((port + i))"; done) 2>/dev/null; do port=$((port + 3)); done

cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=5
MpiDefault=none
MailProg=/bin/true
NodeName=n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2
NodeName=n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2
PartitionName=all Nodes=n1,n2 Default=yes
END

no_job_is_left() { [ -z "$(squeue --noheader)" ]; }
nodes_are_idle() { [ "$(sinfo --noheader --states=idle --format=%D)" = 2 ]; }

wait_until() {
    for _ in $(seq 300); do
        ! "$@" 2>/dev/null || return 0
        sleep 0.1
    done
    cat "$dir"/*.err >&2
    return 1
}

daemons=()
end() {
    # Jobs outlive the daemons.
    scancel --user="$(id -un)" 2>/dev/null || true
    wait_until no_job_is_left || true
    kill "${daemons[@]}" 2>/dev/null || true
    wait
}
trap end EXIT

dd if=/dev/urandom of="$dir/munge.key" bs=128 count=1 status=none && chmod 400 "$dir/munge.key"
munged --force --foreground --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" 2>"$dir/munged.err" &
daemons+=($!)
wait_until test -S "$dir/munge.socket"
slurmctld -D 2>"$dir/slurmctld.err" &
daemons+=($!)
for node in n1 n2; do
    # shellcheck disable=SC2016 # $0 is for the inner shell
    unshare --uts --mount bash -c 'hostname $0 && mount -t tmpfs tmpfs /dev/shm && exec slurmd -D -N $0' "$node" 2>"$dir/$node.err" &
    daemons+=($!)
done
wait_until nodes_are_idle
"$@"
