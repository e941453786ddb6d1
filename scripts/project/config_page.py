"""Write docs/config.md: every key of a config, from the dataclasses that `--explain` reads.

    python scripts/project/config_page.py

The sections that all configs share come first, then those of the components. The first component of
a kind is listed in full, each other one by what differs from it, unless that is longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.config import conversion
from lm.config.components import COMPONENTS, EVALUATIONS, components_in
from lm.config.tree import ConfigTree

PAGE = Path(__file__).resolve().parents[2] / "docs" / "config.md"
HEAD = """# Every key of a config

Written by `make docs` from the dataclasses; `lm train --config=FILE --explain` prints the same for
one config, with its values. A key is set in a config file (`config.train.num_steps = 100`) or by a
flag (`--config.train.num_steps=100`); None unsets it. A component is chosen by its name:
`--config.optimizer.name=lion`. Evaluations inside the run are added by the name of their component,
under names of your own: `--config.evaluations.grammar.name=blimp`.
"""
PIPE = r"\|"  # inside a cell
Row = tuple[str, Any, str]  # key, default, sentence


def rows(**components: str) -> list[Row]:
    return explained(conversion.default(**components))


def explained(config: ConfigTree) -> list[Row]:
    return [(path, default, text) for path, _, default, text in conversion.explain(config)]


def names(package: str) -> list[str]:
    """The components of a package: its modules that have a `Config`."""
    return components_in(package)


def table(found: list[Row]) -> str:
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for path, default, text in found:
        cells = (f"`{path}`", f"`{default!r}`", text)
        lines.append(f"| {' | '.join(cell.replace('|', PIPE) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def sections() -> Iterator[str]:
    yield HEAD
    usual = conversion.names(conversion.default())
    shared: dict[str, list[Row]] = {}
    for row in rows():
        shared.setdefault(row[0].split(".")[0], []).append(row)
    for section, found in sorted(shared.items()):
        if section not in COMPONENTS:
            yield f"## {section}\n\n{table(found)}"
    for kind, package in COMPONENTS.items():
        first = shared[kind]
        yield f"## {kind}: {usual[kind]}\n\n{table(first)}"
        for name in names(package):
            if name == usual[kind]:
                continue
            own = [row for row in rows(**{kind: name}) if row[0].startswith(f"{kind}.")]
            missing = {row[0] for row in first} - {row[0] for row in own}
            heading = f"## {kind}: {name}\n\n"
            if len(missing) > len(own):
                yield heading + table(own)
                continue
            text = f"As {usual[kind]}, with\n\n" + table([row for row in own if row not in first])
            if missing:
                text += f"\nand without {', '.join(f'`{path}`' for path in sorted(missing))}.\n"
            yield heading + text
    for name in names(EVALUATIONS):
        config = conversion.default()
        config.evaluations["NAME"] = conversion.evaluation(name)
        own = [row for row in explained(config) if row[0].startswith("evaluations.")]
        yield f"## evaluations: {name}\n\n{table(own)}"


def page() -> str:
    return "\n".join(sections())


if __name__ == "__main__":
    PAGE.write_text(page())
