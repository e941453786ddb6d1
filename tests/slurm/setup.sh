#!/bin/bash
# A SLURM of its own on this machine, to test scripts/launch/slurm.sbatch with. As root, on Debian:
#
#     eval "$(tests/slurm/setup.sh start)"   # installs what is missing, starts, sets SLURM_CONF
#     python -m pytest -m slurm tests/test_slurm.py
#     tests/slurm/setup.sh stop              # ends the daemons, deletes their folder
#
# One node, this machine. Ports (PORT=26817 and the next), sockets, keys and all files (in
# DIR=/run/lm-slurm) are its own, so that it lives beside another SLURM.
set -euo pipefail

DIR=${DIR:-/run/lm-slurm}
PORT=${PORT:-26817} # slurmctld's; the next one is slurmd's
DAEMONS=(slurmd slurmctld munged)
PACKAGES=(slurmctld slurmd slurm-client munge)

main() {
  [[ $(id -u) == 0 ]] || fail "only root may start the daemons"
  case ${1:-} in
    start)
      stop
      install_missing >&2
      configure
      start >&2
      echo "export SLURM_CONF=$DIR/slurm.conf"
      ;;
    stop) stop ;;
    *)
      sed -n '2,9s/^# \?//p' "$0"
      [[ ${1:-} == --help ]] || exit 2
      ;;
  esac
}

fail() {
  echo "error: $*" >&2
  exit 1
}

install_missing() {
  local daemon
  for daemon in "${DAEMONS[@]}"; do
    [[ -x $(command -v "$daemon") ]] || {
      apt-get update --quiet --quiet
      DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends \
        "${PACKAGES[@]}"
      return
    }
  done
}

configure() {
  # munged runs as its own user and refuses folders that others may write to
  install --directory --mode=755 "$DIR" "$DIR"/{state,spool}
  install --directory --mode=755 --owner=munge "$DIR/munge"
  dd if=/dev/urandom of="$DIR/munge/key" bs=1024 count=1 status=none
  chown munge "$DIR/munge/key"
  chmod 400 "$DIR/munge/key"
  cat >"$DIR/slurm.conf" <<CONF
ClusterName=lm-test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$PORT
SlurmdPort=$((PORT + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/slurmd.log
# no control groups: they are not to be had in a container
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
ReturnToService=2
KillWait=30
NodeName=localhost NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(free --mebi | awk 'NR == 2 {print $2}') State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
  export SLURM_CONF=$DIR/slurm.conf
  su --shell /bin/sh munge --command="exec munged --socket=$DIR/munge/socket --key-file=$DIR/munge/key \
    --pid-file=$DIR/munge/munged.pid --log-file=$DIR/munge/log --seed-file=$DIR/munge/seed"
  slurmctld -c
  slurmd -N localhost
  local tries
  for ((tries = 0; tries < 60; tries++)); do
    [[ $(sinfo --noheader --format=%T 2>/dev/null) == idle ]] && return
    sleep 0.5
  done
  tail "$DIR"/*.log
  fail "the node is not idle after 30 s; the end of the logs is above"
}

stop() {
  local file pid tries
  for file in "$DIR"/slurmd.pid "$DIR"/slurmctld.pid "$DIR"/munge/munged.pid; do
    pid=$(cat "$file" 2>/dev/null) || continue # the daemon deletes it at its end
    kill "$pid" 2>/dev/null || continue
    for ((tries = 0; tries < 40; tries++)); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.25
    done
  done
  rm -rf "$DIR"
}

main "$@"
