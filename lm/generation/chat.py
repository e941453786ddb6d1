"""Dialogues as prompts: a list of messages, written by a Jinja2 template as models expect them.

A template is that of a Hugging Face tokenizer (`chat_template` in tokenizer_config.json, or a file
chat_template.jinja). It runs in Jinja2's sandbox, and sees `messages`, `add_generation_prompt`,
`bos_token`, `eos_token` and `raise_exception`.
"""

from __future__ import annotations

import datetime
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from lm.sources.messages import content_text
from lm.tokenizers.tokenizer import Tokenizer

# role (system, user or assistant), and content: a text, or a list of {"type": "text", "text": ...}
Message: TypeAlias = Mapping[str, object]

_PRIVATE = 0xF0000  # the first character of a plane that no text uses

# For tokenizers that bring none: roles by name, and an eos after what the model says.
DEFAULT = """\
{%- for message in messages -%}
{{ message.role }}: {{ message.content }}{{ eos_token if message.role == "assistant" else "\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}assistant:{%- endif -%}
"""


class Chat:
    """A template, and the tokenizer of the texts that it renders."""

    def __init__(self, tokenizer: Tokenizer, template: str = DEFAULT) -> None:
        """Raise ValueError where `template` is no Jinja2."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda text: datetime.datetime.now().strftime(text)
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not Jinja2: {error}") from error
        self._tokenizer, self.source = tokenizer, template
        names = {i: name for name, i in tokenizer.special_ids.items()}
        self._tokens = {
            "bos_token": names.get(tokenizer.bos_id, "") if tokenizer.start_ids else "",
            "eos_token": names.get(tokenizer.eos_id, ""),
        }

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The text of a dialogue, and with add_generation_prompt the start of the next message.

        Raises:
            ValueError: a message has no role or content, or writes out a special token, which would
                pass for the template's; or the template refuses the messages.
        """
        messages = [_plain(i, message) for i, message in enumerate(messages)]
        for i, message in enumerate(messages):
            for name in self._tokenizer.special_ids:
                if name in message["content"]:
                    raise ValueError(f"message {i} contains the special token {name}")
        return self._write(messages, add_generation_prompt)

    def _write(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        import jinja2

        values = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(**values, **self._tokens)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    def encode(self, messages: Sequence[Message]) -> np.ndarray:
        """The prompt for the assistant's next message: int32 ids, without the `start_ids` that a
        `Generator` puts first.

        A special token that a message writes out stays text there, and never becomes the token.

        Raises:
            ValueError: a message has no role or content, or the template refuses the messages.
        """
        messages = [_plain(i, message) for i, message in enumerate(messages)]
        special = self._tokenizer.special_ids
        contents = "\0".join(message["content"] for message in messages)
        unused = (chr(i) for i in itertools.count(_PRIVATE) if chr(i) not in contents)
        spelled = [n for n in sorted(special, key=len, reverse=True) if n in contents]
        marks = dict(zip(spelled, unused, strict=False))
        for name, mark in marks.items():
            messages = [{**m, "content": m["content"].replace(name, mark)} for m in messages]
        text = self._write(messages, add_generation_prompt=True)
        ids = self._read_marked(text, marks) if marks else self._tokenizer.encode_special(text)
        start = self._tokenizer.start_ids
        return ids[len(start) :] if tuple(ids[: len(start)]) == start else ids

    def _read_marked(self, text: str, marks: Mapping[str, str]) -> np.ndarray:
        """The ids of a text in which `marks` stand for names of special tokens that are text."""
        special = self._tokenizer.special_ids
        names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        spelled = str.maketrans({mark: name for name, mark in marks.items()})
        parts = (
            [special[part]] if part in special else self._tokenizer.encode(part.translate(spelled))
            for part in re.split(f"({names})", text)
            if part
        )
        return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)

    @property
    def end_id(self) -> int:
        """The token that ends a message of the assistant: the first special one that the template
        writes after it; eos where it writes none.
        """
        marker = "\uf8ff"  # of no meaning, and in no template
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
        after = self.render(messages, add_generation_prompt=False).rpartition(marker)[2]
        found = {
            after.find(name): i for name, i in self._tokenizer.special_ids.items() if name in after
        }
        return found[min(found)] if found else self._tokenizer.eos_id


def read(path: str) -> str | None:
    """The template in a file of Jinja2, in a tokenizer_config.json, or in a folder with either;
    None where the folder or the JSON has none.
    """
    file = Path(path)
    if file.is_dir():
        names = (file / "chat_template.jinja", file / "tokenizer_config.json")
        return next((read(str(name)) for name in names if name.is_file()), None)
    if file.suffix != ".json":
        return file.read_text()
    template = json.loads(file.read_text()).get("chat_template")
    if isinstance(template, list):  # several, by name
        return next((t["template"] for t in template if t["name"] == "default"), None)
    return template


def _plain(i: int, message: object) -> dict[str, str]:
    """Message number `i` with a text as its content: that of its parts, "" for null."""
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        got = [*message] if isinstance(message, Mapping) else message
        raise ValueError(f"message {i} must have a role and a content, got {got}")
    role, content = message["role"], message["content"]
    try:
        text = content_text(content)
    except ValueError as error:
        raise ValueError(f"message {i} {error}") from None
    if not isinstance(role, str):
        raise ValueError(f"message {i} must have a text as its role, got {role!r}")
    return {"role": role, "content": text}


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
