"""Messages of dialogues as text.

A message has a role and a content: a text, null, or a list of parts as chat services write them,
`{"type": "text", "text": ...}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

_CALLS = ("tool_calls", "function_call")


def content_text(content: object) -> str:
    """Return the text of a message's content. Raises ValueError for a part that is no text."""
    parts: list[Any] = content if isinstance(content, list) else [content]
    texts = []
    for part in parts if content is not None else ():
        is_text = isinstance(part, Mapping) and part.get("type") == "text"
        text = part.get("text") if is_text else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"has a part that is no text: {kind}")
        texts.append(text)
    return "".join(texts)


def is_dialogue(value: object) -> TypeGuard[list[Mapping[str, Any]]]:
    """Return True for a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in value)
    )


def dialogue_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return a dialogue as lines `role: content`, as the template of `lm.generation.chat` writes
    it; other keys of the messages are left out. Raises ValueError for what is no text.

        >>> dialogue_text([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", ...}])
        "user: 2 + 2?\\nassistant: 4"
    """
    lines = []
    for i, message in enumerate(messages):
        if called := [key for key in _CALLS if message.get(key)]:
            raise ValueError(f"message {i} has {called[0]}, which are no text")
        try:
            lines.append(f"{message['role']}: {content_text(message['content'])}")
        except ValueError as error:
            raise ValueError(f"message {i} {error}") from None
    return "\n".join(lines)
