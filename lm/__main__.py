"""The command `lm`: `lm train` runs scripts/train.py, and so on for every script there."""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from pathlib import Path

from lm.exit_codes import Exit

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
HELP = ("help", "-h", "--help")
USAGE = "usage: lm COMMAND [FLAGS]\n\nlm COMMAND --help lists the flags of a command.\n\n"


def main() -> int:
    """Run the script that the first argument names, with the others as its flags.

    Returns an exit code where there is no such script; else the script ends the process.
    """
    scripts = {path.stem.replace("_", "-"): path for path in sorted(SCRIPTS.glob("*.py"))}
    name = sys.argv[1].replace("_", "-") if len(sys.argv) > 1 else "help"
    if name in HELP:
        width = max(map(len, scripts))
        lines = [f"  {name:<{width}}  {summary(path)}\n" for name, path in scripts.items()]
        print(USAGE + "".join(lines), end="")
        return Exit.SUCCESS
    if name not in scripts:
        near = difflib.get_close_matches(name, scripts, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: no command {sys.argv[1]}{hint} (lm --help lists them)", file=sys.stderr)
        return Exit.USAGE
    sys.argv = [str(scripts[name]), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
    return Exit.SUCCESS


def summary(path: Path) -> str:
    """The first sentence of a script's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).rstrip(":.")


if __name__ == "__main__":
    sys.exit(main())
