#!/bin/bash
# Train on the nodes of a SLURM allocation, one process for all devices of a node:
#     sbatch --nodes=4 --gpus-per-node=8 scripts/launch/slurm.sh --config=configs/gpt2.py --workdir=runs/gpt2
# Submit it from the folder of the repository, which all nodes must see, like the workdir.
#SBATCH --job-name=lm
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
# Five minutes before the time is over SLURM sends SIGTERM to the tasks: they save and end with 143.

set -u
cd "$SLURM_SUBMIT_DIR" || exit 1
srun --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" scripts/train.py "$@"
code=$?
case $code in
  # A process was killed, hung or lost another: the same command goes on from the last checkpoint.
  42 | 46 | 134 | 137 | 139 | 143) scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit $code
