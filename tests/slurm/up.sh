#!/bin/bash
# Bring up (idempotently) a one-machine Slurm "cluster" of N pseudo nodes as root, without systemd or cgroups.
#   source <(bash slurm_up.sh)      # prints the export of SLURM_CONF on stdout, everything else on stderr
#   bash slurm_up.sh down           # stops only the daemons this script started (by pid file)
# Env: SLURM_DIR (state folder), SLURM_NODES (default 2), SLURM_CPUS (CPUs claimed per node, default 4)
set -euo pipefail
DIR=${SLURM_DIR:-${TMPDIR:-/tmp}/lightning_autotp_slurm}; N=${SLURM_NODES:-2}; CPUS=${SLURM_CPUS:-4}
CTLPORT=${SLURM_CTLPORT:-16817}; BASE=${SLURM_BASEPORT:-17001}
HOST=$(hostname -s)
log() { echo "slurm_up: $*" >&2; }
# a pid file counts only while that pid is still one of the three daemons (pids are reused)
alive() { [ -s "$1" ] && case "$(cat "/proc/$(cat "$1" 2>/dev/null)/comm" 2>/dev/null)" in slurmctld|slurmd|munged) ;; *) false;; esac; }
stop() { if alive "$1"; then kill "$(cat "$1")"; for _ in $(seq 50); do alive "$1" || break; sleep .1; done; fi; rm -f "$1"; }

if [ "${1:-}" = down ]; then
  for p in "$DIR"/slurmd.*.pid "$DIR/slurmctld.pid" "$DIR/munged.pid"; do if [ -e "$p" ]; then stop "$p"; fi; done
  log down; exit 0
fi

if ! command -v slurmctld >/dev/null || ! command -v slurmd >/dev/null || ! command -v munged >/dev/null; then
  apt-get update -qq >&2
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >&2
fi

mkdir -p "$DIR/state"; chmod 755 "$DIR"
# names of the pseudo nodes must resolve: Lightning takes node 1's name as MASTER_ADDR
for i in $(seq "$N"); do grep -qE "[[:space:]]node$i([[:space:]]|\$)" /etc/hosts || echo "127.0.0.1 node$i" >> /etc/hosts; done

# munge: its own user, socket and key in the state folder (munged refuses group/world writable parents such as /tmp: --force)
if ! alive "$DIR/munged.pid"; then
  [ -s /etc/munge/munge.key ] || mungekey --create
  mkdir -p /run/munge && chown munge: /run/munge && chmod 755 /run/munge
  mkdir -p /var/log/munge /var/lib/munge && chown munge: /var/log/munge /var/lib/munge && chmod 700 /var/log/munge /var/lib/munge
  if ! munge -n >/dev/null 2>&1; then       # one may already be running (a systemd machine)
    runuser -u munge -- munged
    cp /run/munge/munged.pid "$DIR/munged.pid"
  fi
fi

cat > "$DIR/slurm.conf.new" <<CONF
ClusterName=onebox
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$CTLPORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits cred_expire seconds before it starts again (default 120)
AuthInfo=cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=300
InactiveLimit=0
SlurmdTimeout=300
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool.%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.%n.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
NodeName=node[1-$N] NodeHostName=$HOST NodeAddr=127.0.0.1 Port=[$BASE-$((BASE+N-1))] CPUs=$CPUS RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
CONF
if ! cmp -s "$DIR/slurm.conf.new" "$DIR/slurm.conf"; then      # changed: restart ours
  for p in "$DIR"/slurmd.*.pid "$DIR/slurmctld.pid"; do if [ -e "$p" ]; then stop "$p"; fi; done
  mv "$DIR/slurm.conf.new" "$DIR/slurm.conf"
fi
rm -f "$DIR/slurm.conf.new"
export SLURM_CONF=$DIR/slurm.conf

alive "$DIR/slurmctld.pid" || slurmctld -c >&2
for i in $(seq "$N"); do
  mkdir -p "$DIR/spool.node$i"
  alive "$DIR/slurmd.node$i.pid" || slurmd -N "node$i" >&2
done
for _ in $(seq 100); do
  idle=$(sinfo -h -N -o %T 2>/dev/null | grep -cE '^(idle|mixed|allocated)$' || true)
  [ "$idle" -ge "$N" ] && break
  sleep .2
done
sinfo -N >&2
[ "$idle" -ge "$N" ] || { log "nodes not up, see $DIR/*.log"; tail -5 "$DIR"/*.log >&2; exit 1; }
echo "export SLURM_CONF=$SLURM_CONF"
