#!/bin/bash
# What tpu_vm.sh does on a host: install, start FLAGS, follow, stop or kill the run; does it run?
#
# Each may come twice, when the first answer got lost. The run has its process group, its log
# (run.log) and, when it is over, its exit code (run.code) in the folder of the repository.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1

# not a number that another process has since the machine started again
runs() { [[ -s run.pid ]] && grep -qs tpu_host.sh "/proc/$(<run.pid)/cmdline"; }

case ${1:-} in
  runs) runs ;;
  install)
    # uv brings a Python of its own: that of the TPU images is too old
    python3 -m pip install --quiet --user uv && uv=$(python3 -m site --user-base)/bin/uv &&
      { [[ -x .venv/bin/python ]] || "$uv" venv --quiet --python=3.11 .venv; } &&
      "$uv" pip install --quiet --python=.venv/bin/python --constraint=constraints.txt \
        --editable='.[tpu]'
    ;;
  start)
    runs && echo "a run goes on" && exit
    rm -rf run.code run.stop
    setsid scripts/launch/tpu_host.sh supervise "${@:2}" >>run.log 2>&1 </dev/null &
    echo $! >run.pid
    ;;
  supervise)
    trap : TERM # the process is told, too, and this waits for it
    # a shell without a terminal has its background jobs ignore SIGINT, and they would hand that on
    env --default-signal=INT,TERM .venv/bin/python scripts/train.py "${@:2}"
    echo $? >run.code
    ;;
  follow)
    [[ -s run.pid ]] || { echo "nothing was started here" >&2 && exit 1; }
    tail --lines=50 --follow=name --pid="$(<run.pid)" run.log
    exit "$(cat run.code 2>/dev/null || echo 137)"
    ;;
  # SIGINT: the run saves and ends with 130, which is no reason to start it again. Once: a second
  # one would end it without a save.
  stop) ! runs || ! mkdir run.stop 2>/dev/null || kill -INT -- "-$(<run.pid)" ;;
  kill) ! runs || kill -KILL -- "-$(<run.pid)" ;;
  *)
    sed -n '2,/^set/{/^set/d;s/^# \?//p}' "$0"
    [[ ${1:-} == --help ]] || exit 2
    ;;
esac
