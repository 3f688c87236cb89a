#!/usr/bin/env bash
# Starts and stops a SLURM cluster of one node on this machine, for tests: all of it lies in FOLDER.
#
#   tests/slurm/cluster.sh install         Debian's packages, as root
#   tests/slurm/cluster.sh start FOLDER    munged, slurmctld and slurmd, as root
#   tests/slurm/cluster.sh stop FOLDER     ends the daemons that `start` began, by their process ids
#
# Afterwards `SLURM_CONF=FOLDER/slurm.conf` makes sbatch, squeue and scontrol talk to it. The node pretends to
# have SLURM_TEST_CPUS processors (2), whatever the daemons may use; `taskset` limits those.
set -Eeuo pipefail

if [ "${1:-}" = install ]; then
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends slurm-wlm munge
    exit
fi
folder=$(mkdir -p "$2" && cd "$2" && pwd)

running() { [ -s "$folder/$1.pid" ] && kill -0 "$(cat "$folder/$1.pid")" 2> /dev/null; }

stop() {
    for name in slurmd slurmctld munged; do
        if running "$name"; then
            pid=$(cat "$folder/$name.pid")
            kill "$pid"
            for _ in $(seq 150); do kill -0 "$pid" 2> /dev/null || continue 2; sleep 0.1; done
            kill -9 "$pid"
        fi
    done
}

start() {
    trap stop ERR
    host=$(hostname -s)
    ports=$((20000 + $$ % 10000))
    mkdir -p "$folder/state" "$folder/spool" "$folder/munge"
    head -c 128 /dev/urandom > "$folder/munge/key"
    chmod 600 "$folder/munge/key"
    chmod 711 "$folder/munge"
    cat > "$folder/slurm.conf" << CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$ports
SlurmdPort=$((ports + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=60
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=${SLURM_TEST_CPUS:-2} State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
    munged --force --socket="$folder/munge/socket" --key-file="$folder/munge/key" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge/seed"
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF"
    for _ in $(seq 300); do
        if [ "$(sinfo --noheader --format %t --partition main 2> /dev/null)" = idle ]; then
            echo "SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.1
    done
    echo "the node does not become idle; see $folder/*.log" >&2
    stop
    return 1
}

case "$1" in
    start) start ;;
    stop) stop ;;
    *) echo "usage: $0 install | start FOLDER | stop FOLDER" >&2 && exit 2 ;;
esac
