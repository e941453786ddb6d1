# shellcheck shell=bash
# Written by scripts/launch/exit_codes.py from lm/exit_codes.py: the codes after which a
# launcher starts the run again.
RESTART_CODES=(42 46 48 134 135 137 139 143)

restarts() { [[ " ${RESTART_CODES[*]} " == *" $1 "* ]]; }
