# shellcheck shell=bash
# Written by scripts/launch/exit_codes.py from lm/exit_codes.py: the codes after which a
# launcher starts the run again, the pauses before that, by the number of restarts in a
# row, and the seconds after which an attempt counts as progress: they start anew.
RESTART_CODES=(42 46 48 52 134 135 137 139 143)
PAUSES=(1 2 4 8 16 32 64 128 256 300)
PROGRESS=${PROGRESS:-1200}

restarts() { [[ " ${RESTART_CODES[*]} " == *" $1 "* ]]; }

# The pause before restart $1 in a row: at most that of PAUSES, less up to half of it.
pause() {
  local last=$((${#PAUSES[@]} - 1)) longest
  longest=${PAUSES[$(($1 - 1 < last ? $1 - 1 : last))]}
  echo $((longest - RANDOM % (longest / 2 + 1)))
}
