#!/bin/bash
# Train on all hosts of a Cloud TPU slice, one process each:
#     TPU=my-tpu ZONE=us-east5-a scripts/launch/tpu_vm.sh --config=configs/gpt2.py --workdir=gs://bucket/gpt2
# Every host needs the repository, with its .venv, in the home folder under the name DIR (default:
# lm), and may read and write the workdir. With INTERNAL_IP=1 gcloud connects inside the network.
set -eu
: "${TPU:?name of the TPU}" "${ZONE:?zone of the TPU}"

# After a failure of a host: the same command goes on from the last checkpoint.
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  ${INTERNAL_IP:+--internal-ip} \
  --command="cd ${DIR:-lm} && .venv/bin/python scripts/train.py$(printf ' %q' "$@")"
