"""Dialogues: those of a file, one a line, and one in the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def answer(generator: Any, chat: Any, request: dict[str, Any], path: str) -> int:
    """Print every dialogue of a file with the assistant's next message, a line of JSON each.

    A line that can't be answered is printed with its error in place of a reply, and named on the
    standard error. Returns 1 where that are all of them.
    """
    room = generator.longest_prompt(request["max_new_tokens"])
    entries: list[dict[str, Any]] = []
    asked: list[tuple[int, Any]] = []  # (index among the entries, ids)
    for i, line in enumerate(Path(path).read_bytes().rstrip(b"\n").split(b"\n")):
        entries.append({})
        try:
            entries[i]["messages"] = _dialogue(line)
            ids = chat.encode(entries[i]["messages"])
            if len(ids) > room:
                raise ValueError(f"{len(ids)} tokens, of which no more than {room} fit")
            asked.append((i, ids))
        except ValueError as error:
            entries[i]["error"] = str(error)
            print(f"{path}, line {i + 1}: {error}", file=sys.stderr)
    replies: dict[int, list[str]] = {}
    for made in generator.generate([ids for _, ids in asked], **request):
        replies.setdefault(asked[made.prompt][0], []).append(made.text.strip())
    for i, entry in enumerate(entries):
        for text in replies.get(i, ()):
            reply = {"role": "assistant", "content": text}
            whole = {"messages": [*entry["messages"], reply]}
            print(json.dumps(whole, ensure_ascii=False))
        if "error" in entry:
            print(json.dumps(entry, ensure_ascii=False))
    if left := len(entries) - len(asked):
        print(f"{path}: {left} of {len(entries)} dialogues have no answer", file=sys.stderr)
    return int(not asked)


def _dialogue(line: bytes) -> list[Any]:
    """The messages of a line of JSON."""
    try:
        messages = json.loads(line)["messages"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError('not {"messages": [...]}') from error
    if not isinstance(messages, list):
        raise ValueError('not {"messages": [...]}')
    return messages


def banner(workdir: str, step: int, experiment: Any, max_new_tokens: int) -> str:
    """The lines that open a dialogue: the model, its context, and how to leave."""
    from jax import tree

    from lm.telemetry.progress import format_quantity

    count = sum(leaf.size for leaf in tree.leaves(experiment.abstract_params))
    return (
        f"{workdir}, step {step}: {format_quantity(count)} parameters, a context of "
        f"{experiment.config.model.max_length:,} tokens, replies of at most {max_new_tokens:,}; "
        "what no longer fits is forgotten, the oldest first.\n"
        "Type a message and Enter; Ctrl-D on an empty line leaves."
    )


def converse(generator: Any, chat: Any, request: dict[str, Any], system: str | None) -> int:
    """Answers each line of the standard input, until it ends. What no longer fits is forgotten,
    the oldest first; a line that does not fit by itself is refused, and the dialogue goes on.

    Raises:
        ValueError: the system's message leaves no room.
    """
    first = [{"role": "system", "content": system}] if system else []
    messages: list[dict[str, str]] = []
    room = generator.longest_prompt(request["max_new_tokens"])
    empty = len(chat.encode([*first, {"role": "user", "content": ""}]))
    if empty > room:
        raise ValueError(
            f"--system and the template take {empty} tokens, of which no more than {room} fit "
            f"beside --max-new-tokens ({request['max_new_tokens']})"
        )
    show = sys.stderr.write if sys.stdin.isatty() else lambda text: 0
    while True:
        show("\n> ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return 0
        asked = {"role": "user", "content": line.rstrip("\n")}
        try:
            prompt, kept = _fitting(chat, first, [*messages, asked], room)
        except ValueError as error:  # of what was typed
            print(f"error: {error}", file=sys.stderr)
            continue
        messages, reply = kept, b""
        for piece in generator.stream([prompt], **request):
            fresh = piece.data if reply else piece.data.lstrip()
            reply += fresh
            sys.stdout.buffer.write(fresh)
            sys.stdout.buffer.flush()
        print(flush=True)
        messages.append({"role": "assistant", "content": reply.decode(errors="replace").strip()})


def _fitting(chat: Any, first: list[Any], messages: list[Any], room: int) -> tuple[Any, list[Any]]:
    """(ids, messages) of the latest messages that fit after those of `first`."""
    while True:
        ids = chat.encode([*first, *messages])
        if len(ids) <= room:
            return ids, messages
        if len(messages) == 1:
            raise ValueError(f"this takes {len(ids)} tokens, of which no more than {room} fit")
        messages = messages[2:]  # without a question and its answer
