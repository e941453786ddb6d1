"""Find docstrings that open with a question word or ask a question, and mangled paragraphs.

    python scripts/project/lint_prose.py lm scripts configs tests

A paragraph of a docstring or comment is mangled where a line of one or two words stands inside it:
what a tool leaves that wraps again without joining lines. Prints FILE:LINE of each; the exit code
is 1 if there are any.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

OPENERS = re.compile(r"(What|Which|How|Whether|Of|Where)\b")
QUESTION = re.compile(r"\?(\s|$)")
LISTED = re.compile(r"[-*+|>]|\d+[.)]|.*https?://|\.\.\.|.*[:|`]$|.*  ")  # no prose of a paragraph
Finding = tuple[int, str]


def findings(source: str) -> Iterator[Finding]:
    """(line, complaint) of everything in a file's docstrings and comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text:
                yield from _docstring(node.body[0].lineno, text)
    for line, text in _comments(source):
        yield from _mangled(line, text)


def _docstring(line: int, text: str) -> Iterator[Finding]:
    summary = text.split("\n\n")[0]
    if found := OPENERS.match(text):
        yield line, f"opens with {found[0]}"
    if QUESTION.search(summary):
        yield line, "asks a question"
    yield from _mangled(line, text)


def _mangled(first: int, text: str) -> Iterator[Finding]:
    """Lines of one or two words that the paragraph goes on after, in the same indentation."""
    lines = text.split("\n")
    for i in range(1, len(lines) - 1):
        before, line, after = lines[i - 1 : i + 2]
        same = len({len(x) - len(x.lstrip()) for x in (before, line, after) if x.strip()}) == 1
        words = line.split()
        prose = not any(LISTED.match(x.strip()) for x in (before, line, after))
        if 0 < len(words) <= 2 and before.strip() and after.strip() and same and prose:
            yield first + i, f"a line of {len(words)}: {line.strip()}"


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """(first line, text) of each block of comments that have lines to themselves."""
    block: list[str] = []
    start = last = column = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line[: token.start[1]].strip():
            continue
        line, at = token.start
        if block and (line, at) != (last + 1, column):
            yield start, "\n".join(block)
            block = []
        if not block:
            start, column = line, at
        block.append(token.string.removeprefix("#").removeprefix(" "))
        last = line
    if block:
        yield start, "\n".join(block)


def main(folders: Sequence[str]) -> int:
    count = 0
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.py")):
            for line, complaint in sorted(findings(path.read_text())):
                print(f"{path}:{line}: {complaint}")
                count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
