"""The parts of a picture's file, counted before it is opened: Pillow takes time for each of them,
some of it with the square of their number.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator

# far more than cameras and editors write: a progressive JPEG has ten scans, a profile of colours
# 30 segments, and 64 MiB of chunks or blocks of the usual size are fewer than these
MOST = {
    "scans": 100,
    "segments": 1024,
    "EXIF segments": 16,
    "chunks": 1024,
    "chunks of pixels": 1 << 14,
    "extensions": 1024,
    "blocks of extensions": 1 << 12,
    "blocks of pixels": 300_000,
    "stray bytes": 1024,
}
_SEGMENT = re.compile(rb"\xff[\x02-\xcf\xda-\xfe]")  # a marker that a length follows
_SEGMENT_OR_END = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
_EXIF, _SCAN, _END = 0xE1, 0xDA, 0xD9


def excess(content: bytes) -> str | None:
    """Return of what a file has too many parts, and how many are allowed; None if of nothing.
    Parts are counted as far as Pillow reads a picture that is no animation.
    """
    readers = {b"\xff\xd8": _jpeg, b"\x89PNG": _png, b"GIF8": _gif}
    for start, reader in readers.items():
        if content.startswith(start):
            counts: collections.Counter[str] = collections.Counter()
            for kind, number in reader(content):
                counts[kind] += number
                if counts[kind] > MOST[kind]:
                    return f"more than {MOST[kind]:,} {kind}"
    return None


def _jpeg(content: bytes) -> Iterator[tuple[str, int]]:
    """Between segments of the header nothing belongs; after the first scan there are pixels."""
    at, in_header = 2, True
    while found := (_SEGMENT if in_header else _SEGMENT_OR_END).search(content, at):
        kind, length_at = content[found.end() - 1], found.end()
        if in_header:
            yield "stray bytes", found.start() - at
        if kind == _END:
            return
        at = length_at + max(int.from_bytes(content[length_at : length_at + 2], "big"), 2)
        yield "segments", 1
        if kind == _EXIF and content.startswith(b"Exif", length_at + 2):
            yield "EXIF segments", 1
        if kind == _SCAN:
            yield "scans", 1
            in_header = False
    if in_header:
        yield "stray bytes", len(content) - at


def _png(content: bytes) -> Iterator[tuple[str, int]]:
    at = 8
    while at + 8 <= len(content):
        kind = content[at + 4 : at + 8]
        yield "chunks of pixels" if kind in (b"IDAT", b"fdAT") else "chunks", 1
        if kind == b"IEND":
            return
        at += 12 + int.from_bytes(content[at : at + 4], "big")


def _gif(content: bytes) -> Iterator[tuple[str, int]]:
    """As far as a second picture, which makes it an animation."""
    at, num_pictures = 13 + _size_of_colors(content, 10), 0
    while at < len(content) and content[at] != ord(";"):
        if content[at] == ord("!"):
            yield "extensions", 1
            at, kind = at + 2, "blocks of extensions"
        elif content[at] == ord(","):
            if num_pictures:
                return
            num_pictures += 1
            at, kind = at + 11 + _size_of_colors(content, at + 9), "blocks of pixels"
        else:
            yield "stray bytes", 1
            at += 1
            continue
        while at < len(content) and content[at]:
            yield kind, 1
            at += 1 + content[at]
        at += 1


def _size_of_colors(content: bytes, at: int) -> int:
    """Return the bytes of a table of colours, by the flags at this place."""
    flags = content[at] if at < len(content) else 0
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
