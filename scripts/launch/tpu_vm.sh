#!/bin/bash
# Train on Cloud TPU slices, one process on each of their hosts, from a machine with gcloud:
#
#     export NAME=gpt2 ZONE=us-east5-a TYPE=v5p-128
#     scripts/launch/tpu_vm.sh train --config=configs/gpt2.py --workdir=gs://bucket/gpt2
#
# [--dry-run] COMMAND, where --dry-run prints the commands instead:
#     train FLAGS   create, install and run, again after each preemption, until the run is over; the
#                   workdir is in a bucket
#     create        ask for the slices, as a queued resource, and wait until they are there
#     install       copy the last commit of this repository to all hosts and make its environment
#     run FLAGS     start scripts/train.py FLAGS on all hosts, and follow
#     logs          follow the log of host 0; the exit code is that of the run (lm/exit_codes.py)
#     stop          all hosts save and end; `train` then ends, too
#     status        the state of the queued resource
#     delete        give the slices back; `train` does it after code 0
#
# `train` may be ended and started again, here or elsewhere: what runs goes on running. It starts
# the run again after the codes of which docs/reliability.md says so (exit_codes.sh), and asks for
# other slices when these are gone; any other code ends it. The variables, with their defaults:
#
#     NAME ZONE TYPE    of the queued resource; its zone; its accelerator, such as v6e-256
#     SLICES=1          more than one talk over the data center's network: config.mesh.slices
#     RUNTIME=          software of the hosts; found by TYPE (v4, v5e, v5p, v6e; none is for tpu7x,
#                       which the Cloud TPU API doesn't have: see gke.sh)
#     SPOT=1            0: on demand
#     PROJECT=          gcloud's own
#     CREATE_FLAGS=     more for the request, such as "--reserved --network=mine"
#     SSH_FLAGS=        such as --internal-ip or --tunnel-through-iap
#     POLL=30           seconds between looks at the state
#     MAX_RESTARTS=100  of `train` in a row, with growing, random pauses between them; after
#                       PROGRESS=1200 seconds an attempt starts both anew
#
# gcloud wants `ssh-add ~/.ssh/google_compute_engine` first, where there are several hosts.
set -eo pipefail # and not -u: macOS has a bash that takes an empty array for an unset variable

SLICES=${SLICES:-1}
SPOT=${SPOT:-1}
POLL=${POLL:-30}
MAX_RESTARTS=${MAX_RESTARTS:-100}
read -ra CREATE_FLAGS <<<"${CREATE_FLAGS:-}"
read -ra SSH_FLAGS <<<"${SSH_FLAGS:-}"
LOST=255 # what ssh ends with when it has no connection
HOST=lm/scripts/launch/tpu_host.sh
UNPACK="rm -rf lm/lm lm/scripts lm/configs && tar -xzf lm.tar.gz"

main() {
  dry=
  dry_state=ABSENT
  [[ ${1:-} == --dry-run ]] && dry=1 && shift
  case ${1:-} in
    train | create | install | run | logs | stop | status | delete) ;;
    --help) usage && return ;;
    *) usage >&2 && return 2 ;;
  esac
  : "${NAME:?name of the queued resource}" "${ZONE:?zone of the TPUs}"
  cd "$(dirname "$0")/../.."
  # shellcheck source=scripts/launch/exit_codes.sh
  source scripts/launch/exit_codes.sh
  "$@"
}

usage() { sed -n '2,/^set/{/^set/d;s/^# \?//p}' "$0"; }

# ---- the queued resource ----

create() {
  : "${TYPE:?accelerator type, such as v5p-128}"
  local runtime=${RUNTIME:-} nodes=("--node-id=$NAME") spot=()
  if [[ ! $runtime ]]; then
    case $TYPE in
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v[234]-*) runtime=tpu-ubuntu2204-base ;;
      *) fail "no runtime is known for TYPE=$TYPE: set RUNTIME" ;;
    esac
  fi
  ((SLICES == 1)) || nodes=("--node-count=$SLICES" "--node-prefix=$NAME")
  [[ $SPOT == 0 ]] || spot=(--spot)
  resource create "$NAME" --accelerator-type="$TYPE" --runtime-version="$runtime" "${nodes[@]}" \
    "${spot[@]}" "${CREATE_FLAGS[@]}" || return
  dry_state=ACTIVE
  await
}

# Returns when the slices are there; fails when they won't be.
await() {
  while look; do
    note "$NAME is $state"
    case $state in
      ACTIVE) return ;;
      ACCEPTED | CREATING | PROVISIONING | WAITING_FOR_RESOURCES) sleep "$POLL" ;;
      *) return 1 ;;
    esac
  done
  return 1
}

# Sets state: ACTIVE, WAITING_FOR_RESOURCES, ..., ABSENT; fails when there is no answer.
look() {
  local command=(resource describe "$NAME" '--format=value(state.state)') answer
  if [[ $dry ]]; then
    "${command[@]}"
    state=$dry_state
  elif answer=$("${command[@]}" 2>&1); then
    state=$(tail -n 1 <<<"$answer")
  elif [[ $answer == *NOT_FOUND* ]]; then
    state=ABSENT
  else
    echo "$answer" >&2
    return 1
  fi
}

status() {
  look
  [[ $dry ]] || echo "$state"
}

delete() { resource delete "$NAME" --force --quiet; }

# ---- the hosts ----

# The command may come twice, when ssh lost the connection: it must not mind.
everywhere() {
  resource ssh "$NAME" --node=all --worker=all --batch-size=all "${SSH_FLAGS[@]}" --command="$1"
}

install() {
  git diff --quiet HEAD || note "what is not committed stays here" >&2
  local archive=${TMPDIR:-/tmp}/lm-$NAME.tar.gz
  execute git archive --prefix=lm/ --output="$archive" HEAD &&
    resource scp "$archive" "$NAME:lm.tar.gz" --node=all --worker=all --batch-size=all \
      "${SSH_FLAGS[@]}" &&
    everywhere "$HOST runs 2>/dev/null || { $UNPACK && $HOST install; }" # not under a run
}

# Not attached to ssh: a run is to outlive connections, of which gcloud opens 64 at a time.
run() { start "$@" && logs; }

start() { everywhere "$HOST start${1+$(printf ' %q' "$@")}"; }

logs() {
  resource ssh "$NAME" --node=0 --worker=0 "${SSH_FLAGS[@]}" --command="$HOST follow"
}

stop() { everywhere "$HOST stop"; }

# ---- until it is over ----

train() {
  local restart=0 all=0 code silent=0 began
  [[ " $*" =~ \ --?workdir[=\ ][a-z0-9]+:// ]] ||
    fail "--workdir=gs://BUCKET/FOLDER is needed: a folder of the hosts is deleted with them"
  while ((restart <= MAX_RESTARTS)); do
    there
    began=$SECONDS
    if ! { install && start "$@"; }; then
      # Perhaps the slices went away and the state doesn't say so yet; perhaps it never will.
      ((++silent < 3)) || delete || true
      ((++restart))
      sleep "$POLL"
      continue
    fi
    silent=0 code=0
    logs || code=$?
    note "exit code $code after $((all++)) restarts"
    ((SECONDS - began < PROGRESS)) || restart=0
    ((++restart))
    if ((code == 0)); then
      delete && return
    elif ((code == LOST)); then
      sleep "$POLL"
    elif restarts "$code"; then
      everywhere "$HOST kill" || true # some may still run
      sleep "$(pause "$restart")"
    else
      note "the slices are still there" && return "$code"
    fi
  done
  fail "gave up after $MAX_RESTARTS restarts in a row"
}

# Returns when there are slices, new ones where there were none, or dead ones.
there() {
  local silent=0
  while true; do
    if ! look; then
      ((++silent < 10)) || fail "no answer about $NAME"
      sleep "$POLL"
      continue
    fi
    silent=0
    case $state in
      ABSENT) create && return ;;
      SUSPENDED) delete ;;
      SUSPENDING | DELETING) sleep "$POLL" ;;
      FAILED) fail "$NAME is FAILED: look at gcloud compute tpus queued-resources describe" ;;
      *) await && return ;;
    esac
  done
}

# ---- the shell ----

resource() {
  execute gcloud compute tpus queued-resources "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

execute() {
  if [[ ! $dry ]]; then
    "$@"
    return
  fi
  local word line="" quote="'" quoted="'\\''"
  for word in "$@"; do
    case $word in
      *[!A-Za-z0-9_@%+=:,./-]*) line+=" '${word//$quote/$quoted}'" ;;
      *) line+=" $word" ;;
    esac
  done
  echo "${line:1}"
}

note() { [[ $dry ]] || echo "tpu_vm.sh: $*"; }

fail() {
  echo "error: $*" >&2
  exit 1
}

main "$@"
