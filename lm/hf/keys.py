"""The keys of a config.json, every one of which somebody must read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# What says nothing about the function that a model computes.
_NO_MATTER = {
    *("_name_or_path", "_from_model_config", "architectures", "dtype", "torch_dtype"),
    *("transformers_version", "transformers.js_config", "model_type", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "decoder_start_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "task_specific_params"),
    *("output_attentions", "output_hidden_states", "output_past", "return_dict", "n_ctx"),
    *("id2label", "label2id", "problem_type", "gradient_checkpointing", "_attn_implementation"),
    *("tokenizer_class", "prefix", "max_length", "do_sample", "num_beams", "classifier_dropout"),
}
_MISSING = object()


class Keys:
    """The content of a config.json: `take` and `expect` read a key, `finish` finds what is left.

    All errors are ValueErrors that name the key with its value.
    """

    def __init__(self, tree: dict[str, Any], tensors: Iterable[str] = ()) -> None:
        """tensors: the names of those beside it, which say what some keys don't."""
        self.tensors = frozenset(tensors)
        self._left = {key: value for key, value in tree.items() if key not in _NO_MATTER}

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """The value of a key, or `default` where it is missing."""
        value = self._left.pop(name, default)
        if value is _MISSING:
            raise ValueError(f"config.json has no key {name}")
        return value

    def expect(self, name: str, *allowed: Any) -> Any:
        """The value of a key that may be missing, else must be one of `allowed`; the first one is
        what a missing key means.
        """
        value = self._left.pop(name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"config.json has {name} = {value!r}, of which there is only "
                f"{', '.join(repr(a) for a in allowed)} here"
            )
        return value

    def translate(self, name: str, table: dict[Any, str], default: Any = _MISSING) -> str:
        """Our word for the value of a key."""
        value = self.take(name, default)
        if value not in table:
            known = ", ".join(repr(key) for key in table)
            raise ValueError(f"config.json has {name} = {value!r}, of which there is only {known}")
        return table[value]

    def ignore(self, *names: str) -> None:
        """Reads keys that make no difference to this family."""
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        """Raises unless every key was read."""
        if self._left:
            left = ", ".join(f"{key} = {value!r}" for key, value in sorted(self._left.items()))
            raise ValueError(f"config.json has keys that mean nothing here: {left}")
