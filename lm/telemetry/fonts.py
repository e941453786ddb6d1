"""Fonts for the letters of a text in a figure, and escapes where no installed font has them."""

from __future__ import annotations

import functools
from collections.abc import Iterable

_PLACEHOLDER = "Last Resort"  # has a box for every character


def families(text: str, family: str = "sans-serif") -> list[str]:
    """`family` and the fewest other installed fonts, best first, that cover `text`.

    `readable` escapes letters that none of them has.
    """
    from matplotlib.font_manager import FontEntry, fontManager

    def distance_from_regular(entry: FontEntry) -> tuple[bool, int]:
        weight = entry.weight if isinstance(entry.weight, int) else 400
        return entry.style != "normal", abs(weight - 400)

    found = [family]
    missing = {c for c in text if c.isprintable()} - _letters(_path(family))
    if not missing:
        return found
    entries = {e.name: e for e in sorted(fontManager.ttflist, key=distance_from_regular)[::-1]}
    fonts = {name: _letters(e.fname) for name, e in sorted(entries.items())}
    while fonts:
        name = max(fonts, key=lambda n: len(missing & fonts[n]))
        gained = missing & fonts.pop(name)
        if not gained:
            break
        found.append(name)
        missing -= gained
    return found


def readable(text: str, fonts: Iterable[str]) -> str:
    r"""`text` with \uXXXX for letters that no font of these families has, and `$` escaped."""
    letters = frozenset[str]().union(*(_letters(_path(name)) for name in fonts))
    shown = (c if c in letters else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown).replace("$", r"\$")


def _path(family: str) -> str:
    from matplotlib.font_manager import FontProperties, findfont

    return findfont(FontProperties(family=[family]))


@functools.cache
def _letters(path: str) -> frozenset[str]:
    """The characters of a font that can be drawn in any size."""
    from matplotlib.font_manager import get_font

    try:
        font = get_font(path)
    except (OSError, RuntimeError):  # listed, but gone, or of a kind that matplotlib can't draw
        return frozenset()
    if not font.scalable or font.family_name.lstrip(".").startswith(_PLACEHOLDER):
        return frozenset()
    return frozenset(map(chr, font.get_charmap()))
