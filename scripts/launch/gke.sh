#!/bin/bash
# Train on a GKE cluster with the JobSet controller (0.6 or later), one process on each node:
#
#     export NAME=gpt2 IMAGE=us-docker.pkg.dev/mine/lm/lm:1
#     ACCELERATOR=tpu-v5p-slice TOPOLOGY=4x4x4 scripts/launch/gke.sh apply \
#         --config=configs/gpt2.py --workdir=gs://bucket/gpt2
#     ACCELERATOR=nvidia-h100-80gb NODES=4 scripts/launch/gke.sh apply --config=...
#
# [--dry-run] COMMAND, where --dry-run prints the commands, and the manifest, instead:
#     apply FLAGS   start scripts/train.py FLAGS in IMAGE (see Dockerfile); the workdir is in a bucket
#     logs          follow the log of process 0
#     status        the JobSet and its pods
#     await         return when it is over, with the exit code of the run (lm/exit_codes.py)
#     delete        end it: the processes get SIGTERM and GRACE seconds to save
#
# The JobSet starts all processes again, from the last checkpoint, when one loses its node or ends
# with a code that asks for it (docs/reliability.md; exit_codes.sh), MAX_RESTARTS times in all; a run
# that fails again and again waits before it begins, and stops by itself. The node pools must be there.
# The variables, with their defaults:
#
#     NAME IMAGE          of the JobSet; with this repository as its working folder
#     ACCELERATOR         tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, tpu7x,
#                         or a GPU such as nvidia-h100-80gb, nvidia-h200-141gb, nvidia-b200
#     TOPOLOGY            of a TPU slice, such as 4x4x4; each slice has a node pool to itself
#     SLICES=1            more than one: config.mesh.slices
#     NODES=1             GPU nodes; for TPUs the chips of TOPOLOGY / DEVICES_PER_NODE
#     DEVICES_PER_NODE=   4 TPU chips, 8 GPUs
#     GRACE=300           seconds from SIGTERM to SIGKILL
#     MAX_RESTARTS=1000   preemptions count, too
#     NAMESPACE=default
#     POLL=30             seconds between looks at the state
set -eo pipefail

DEVICES_PER_NODE=${DEVICES_PER_NODE:-}
NAMESPACE=${NAMESPACE:-default}
POLL=${POLL:-30}
SLICES=${SLICES:-1}
NODES=${NODES:-1}
GRACE=${GRACE:-300}
MAX_RESTARTS=${MAX_RESTARTS:-1000}
# shellcheck source=scripts/launch/exit_codes.sh
source "$(dirname "$0")/exit_codes.sh"

main() {
  dry=
  [[ ${1:-} == --dry-run ]] && dry=1 && shift
  case ${1:-} in
    apply | logs | status | await | delete) ;;
    --help) usage && return ;;
    *) usage >&2 && return 2 ;;
  esac
  : "${NAME:?name of the JobSet}"
  "$@"
}

usage() { sed -n '2,/^set/{/^set/d;s/^# \?//p}' "$0"; }

apply() {
  [[ " $*" =~ \ --?workdir[=\ ][a-z0-9]+:// ]] ||
    fail "--workdir=gs://BUCKET/FOLDER is needed: a folder of a pod is deleted with it"
  : "${IMAGE:?image to run}" "${ACCELERATOR:?such as tpu-v5p-slice or nvidia-h100-80gb}"
  case $ACCELERATOR in
    tpu*) slices_of_tpus ;;
    *) nodes_of_gpus ;;
  esac
  local manifest
  manifest=$(manifest "$@")
  kubectl_ apply --filename=- <<<"$manifest"
}

slices_of_tpus() {
  : "${TOPOLOGY:?of a slice, such as 4x4x4}"
  local chips=$((${TOPOLOGY//x/*})) on_node=${DEVICES_PER_NODE:-4}
  NODES=$((chips / on_node))
  ((NODES * on_node == chips)) ||
    fail "TOPOLOGY=$TOPOLOGY ($chips chips) must be a multiple of DEVICES_PER_NODE ($on_node)"
  DEVICES="{google.com/tpu: '$on_node'}"
  NODE_SELECTOR="{cloud.google.com/gke-tpu-accelerator: $ACCELERATOR, cloud.google.com/gke-tpu-topology: $TOPOLOGY}"
  ANNOTATIONS='{alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}'
}

nodes_of_gpus() {
  ((SLICES == 1)) || fail "SLICES=$SLICES: only TPUs come in slices; set NODES"
  DEVICES="{nvidia.com/gpu: '${DEVICES_PER_NODE:-8}'}"
  NODE_SELECTOR="{cloud.google.com/gke-accelerator: $ACCELERATOR}"
  ANNOTATIONS='{}'
}

# gke.yaml, filled in.
manifest() {
  local text open="\${"
  text=$(<"$(dirname "$0")/gke.yaml")
  text=${text#*$'\n'} # the line that says what the file is
  fill NAME "$NAME"
  fill IMAGE "$IMAGE"
  fill ANNOTATIONS "$ANNOTATIONS"
  fill NODE_SELECTOR "$NODE_SELECTOR"
  fill DEVICES "$DEVICES"
  fill SLICES "$SLICES"
  fill NODES "$NODES"
  fill PROCESSES $((SLICES * NODES))
  fill GRACE "$GRACE"
  fill MAX_RESTARTS "$MAX_RESTARTS"
  fill RESTART_CODES "[$(join "${RESTART_CODES[@]}")]"
  [[ ${text/"${open}COMMAND}"/} != *"$open"* ]] || fail "gke.yaml has a field that nothing fills in"
  fill COMMAND "$(json python scripts/train.py "$@")" # last: flags may look like fields
  echo "$text"
}

join() { (IFS=, && echo "$*"); }

fill() { text=${text//"\${$1}"/"$2"}; }

# The words as a JSON array, which YAML takes as it is. Kubernetes puts variables in place of $(NAME),
# and a $ in place of two.
json() {
  local word line=
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//$'\n'/\\n}
    word=${word//$'\t'/\\t}
    word=${word//'$'/'$$'}
    line+=", \"${word//\"/\\\"}\""
  done
  echo "[${line:2}]"
}

logs() {
  kubectl_ logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

status() { kubectl_ get jobsets,pods --selector="jobset.sigs.k8s.io/jobset-name=$NAME"; }

# A JobSet that failed has pods of its last attempt; a process that lost another one has its code.
await() {
  local state="" codes code
  until [[ $state || $dry ]]; do
    state=$(kubectl_ get jobset "$NAME" --output='jsonpath={.status.terminalState}') || sleep "$POLL"
    [[ $state ]] || sleep "$POLL"
  done
  [[ $state == Failed ]] || return 0
  codes=$(kubectl_ get pods --selector="jobset.sigs.k8s.io/jobset-name=$NAME" \
    --output='jsonpath={.items[*].status.containerStatuses[*].state.terminated.exitCode}')
  for code in $codes; do
    ((code == 0)) || return "$code"
  done
  return 1
}

delete() { kubectl_ delete jobset "$NAME"; }

kubectl_() {
  local command=(kubectl --namespace="$NAMESPACE" "$@")
  if [[ ! $dry ]]; then
    "${command[@]}"
  elif [[ $1 == apply ]]; then
    echo "${command[*]} <<'END'"
    cat
    echo END
  else
    echo "${command[*]}"
  fi
}

fail() {
  echo "error: $*" >&2
  exit 1
}

main "$@"
