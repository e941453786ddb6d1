"""Dialogues as prompts: a list of messages, written by a Jinja2 template as models expect them.

A template is that of a Hugging Face tokenizer (`chat_template` in tokenizer_config.json, or a file
chat_template.jinja). It runs in Jinja2's sandbox, and sees `messages`, `add_generation_prompt`,
`bos_token`, `eos_token` and `raise_exception`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Message: TypeAlias = Mapping[str, str]  # role (system, user or assistant), and content

# For tokenizers that bring none: roles by name, and an eos after what the model says.
DEFAULT = """\
{%- for message in messages -%}
{{ message.role }}: {{ message.content }}{{ eos_token if message.role == "assistant" else "\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}assistant:{%- endif -%}
"""


class Chat:
    """A template, and the tokenizer that reads what it writes."""

    def __init__(self, tokenizer: Any, template: str = DEFAULT) -> None:
        """Raises ValueError where `template` is none."""
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
            "bos_token": names.get(tokenizer.bos_id, ""),
            "eos_token": names.get(tokenizer.eos_id, ""),
        }

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The text of a dialogue; with what the assistant's next message begins with.

        Raises:
            ValueError: a message has no role or content, or writes out a special token, which would
                pass for the template's; or the template refuses the messages.
        """
        import jinja2

        for i, message in enumerate(messages):
            if set(message) != {"role", "content"}:
                raise ValueError(f"message {i} must have a role and a content, got {[*message]}")
            for name in self._tokenizer.special_ids:
                if name in message["content"]:
                    raise ValueError(f"message {i} contains the special token {name}")
        values = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(**values, **self._tokens)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    def encode(self, messages: Sequence[Message]) -> np.ndarray:
        """The prompt for the assistant's next message: int32 ids, without the bos that a
        `Generator` puts first.
        """
        text = self.render(messages, add_generation_prompt=True)
        ids = self._tokenizer.encode_special(text)
        has_bos = (
            len(ids) > 0
            and ids[0] == self._tokenizer.bos_id
            and text.startswith(self._tokens["bos_token"] or "\0")
        )
        return ids[1:] if has_bos else ids

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


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
