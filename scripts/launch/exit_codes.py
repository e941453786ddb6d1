"""Write the exit codes of the launchers in bash and of docs/reliability.md, from lm/exit_codes.py.

python scripts/launch/exit_codes.py
"""

from __future__ import annotations

from pathlib import Path

from lm.exit_codes import KILLED, KILLS, PAUSES, PROGRESS, RESTARTED, Exit, restarts

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- scripts/launch/exit_codes.py writes this table -->\n"


def main() -> None:
    (ROOT / "scripts" / "launch" / "exit_codes.sh").write_text(shell())
    path = ROOT / "docs" / "reliability.md"
    text = path.read_text()
    path.write_text(text.replace(table_in(text), markdown()))


def shell() -> str:
    """The codes that are restarted, and the pauses before that, as bash."""
    codes = sorted(code for code in [*Exit, *KILLS] if restarts(code))
    return (
        "# shellcheck shell=bash\n"
        "# Written by scripts/launch/exit_codes.py from lm/exit_codes.py: the codes after which a\n"
        "# launcher starts the run again, the pauses before that, by the number of restarts in a\n"
        "# row, and the seconds after which an attempt counts as progress: they start anew.\n"
        f"RESTART_CODES=({' '.join(str(int(code)) for code in codes)})\n"
        f"PAUSES=({' '.join(map(str, PAUSES))})\nPROGRESS=${{PROGRESS:-{PROGRESS}}}\n"
        '\nrestarts() { [[ " ${RESTART_CODES[*]} " == *" $1 "* ]]; }\n'
        "\n# The pause before restart $1 in a row: at most that of PAUSES, less up to half of it.\n"
        "pause() {\n"
        "  local last=$((${#PAUSES[@]} - 1)) longest\n"
        "  longest=${PAUSES[$(($1 - 1 < last ? $1 - 1 : last))]}\n"
        "  echo $((longest - RANDOM % (longest / 2 + 1)))\n"
        "}\n"
    )


def markdown() -> str:
    """The table of docs/reliability.md."""
    rows = [(str(int(code)), code.meaning, code.again) for code in Exit]
    kills = (", ".join(map(str, sorted(KILLS))), KILLED, RESTARTED)
    before = [row for row in rows if int(row[0]) < KILLS[0]]
    lines = [("code", "meaning", "start again?"), ("---",) * 3, *before, kills, rows[-1]]
    return BEGIN + "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in lines)


def table_in(text: str) -> str:
    """The table as it stands in docs/reliability.md."""
    table = text[text.index(BEGIN) :]
    return table[: table.index("\n\n") + 1]


if __name__ == "__main__":
    main()
