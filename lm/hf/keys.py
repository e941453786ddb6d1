"""A reader of config.json that accepts no key that nothing reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Keys that can't change a number that the model computes, by the reason.
WITHOUT_EFFECT = {
    "who wrote the file, and from what": """
        _name_or_path _model_name_or_path _from_model_config _commit_hash architectures model_type
        transformers_version transformers.js_config name_or_path is_llama_config finetuning_task""",
    "code and classes to load it with": "auto_map tokenizer_class",
    "type of the stored tensors, which they say themselves": "dtype torch_dtype",
    "how the same numbers are computed": """
        use_cache gradient_checkpointing chunk_size_feed_forward torchscript pretraining_tp
        _attn_implementation _attn_implementation_autoset _attn_implementation_internal
        attn_implementation _flash_attn_2_enabled cache_implementation output_past""",
    "what is returned beside the logits": """
        output_attentions output_hidden_states output_scores return_dict use_return_dict
        return_dict_in_generate""",
    "special tokens: lm/tokenizers/special_tokens.py": """
        bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
        decoder_start_token_id n_special predict_special_tokens eos_token_ids""",
    "how texts are generated": """
        prefix task_specific_params max_length min_length max_new_tokens do_sample num_beams
        num_beam_groups num_return_sequences temperature top_k top_p typical_p repetition_penalty
        length_penalty diversity_penalty early_stopping no_repeat_ngram_size bad_words_ids
        encoder_no_repeat_ngram_size remove_invalid_values forced_bos_token_id forced_eos_token_id
        suppress_tokens begin_suppress_tokens exponential_decay_length_penalty""",
    "heads for other tasks, whose tensors must be skipped by name": """
        id2label label2id num_labels _num_labels problem_type classifier_dropout tf_legacy_loss""",
    "random initialization, before the stored tensors": "initializer_range initializer_factor",
    "lengths that nothing reads beside the model's own": """
        n_ctx max_sequence_length model_max_length""",
    "notes of a training framework": "unsloth_*",
}
_NAMES = frozenset(" ".join(WITHOUT_EFFECT.values()).split())
_PREFIXES = tuple(name[:-1] for name in _NAMES if name.endswith("*"))
# Keys of every class in `transformers` that change nothing with this value.
_OFF = {
    **dict.fromkeys(("is_decoder", "is_encoder_decoder", "add_cross_attention"), False),
    **dict.fromkeys(("tie_encoder_decoder", "use_bfloat16"), False),
    "pruned_heads": {},
}
# Names of one function each. gelu_fast is the tanh approximation with its constants rounded.
ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    "relu": "relu",
    "quick_gelu": "quick_gelu",
    **dict.fromkeys(("silu", "swish"), "silu"),
}
# ends of names of classes that predict tokens or classes of pictures
_WITH_HEAD = (
    *("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "ForImageClassification"),
)
Json = dict[str, Any]  # an object of a JSON file
Fields = dict[str, Any]  # {path: value} of `config.model`
REQUIRED = object()  # in place of a default

Say = Callable[[str], object]


def quiet(line: str) -> None:
    """Say nothing."""


class StrictConfigReader:
    """The content of a config.json: `take` and `expect` read a key, `finish` checks for the others.

    A key that is null is unset: it means what a missing key does. All errors are ValueErrors that
    name the key with its value.
    """

    def __init__(
        self,
        tree: Json,
        tensors: Iterable[str] = (),
        *,
        say: Say = quiet,
        part: str = "",
    ) -> None:
        """tensors: the names of the checkpoint's, which say what some keys don't. say: takes notes
        for the user. part: the key of config.json whose value `tree` is; "": the whole file.
        """
        self.tree, self.tensors, self.say = tree, frozenset(tensors), say
        self._part = part
        self._file = f"config.json, {part}," if part else "config.json"
        self._architectures: tuple[str, ...] = tuple(tree.get("architectures") or ())
        self._left = {
            key: value
            for key, value in tree.items()
            if key not in _NAMES and not key.startswith(_PREFIXES)
        }

    def fill(self, defaults: Mapping[str, object]) -> None:
        """Set unset keys to the values that their class in `transformers` gives them."""
        self._left |= {k: v for k, v in defaults.items() if self._left.get(k) is None}

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of a key, or `default` where it is unset."""
        value = self._left.pop(name, None)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ValueError(f"{self._file} has no key {name}")
        return default

    def take_or_none(self, name: str, default: Any) -> Any:
        """As `take`, of a key for which null and a missing key mean different things."""
        return self._left.pop(name, default)

    def expect(self, name: str, *allowed: object) -> None:
        """Check a key that may be unset, else must be one of `allowed`."""
        if (value := self.take(name, allowed[0])) not in allowed:
            raise self._refused(name, value, allowed)

    def translate(self, name: str, table: Mapping[Any, str], default: Any = REQUIRED) -> str:
        """The field's value for the value of a key."""
        if (value := self.take(name, default)) not in table:
            raise self._refused(name, value, table)
        return table[value]

    def _refused(self, name: str, value: object, allowed: Iterable[object]) -> ValueError:
        known = ", ".join(repr(one) for one in allowed)
        return ValueError(f"{self._file} has {name} = {value!r}; only {known} can be represented")

    def has_head(self, prefix: str) -> bool:
        """True if the model has a projection to the vocabulary of its own.

        Its class has one, or a tensor's name starts with `prefix`, or neither are known.
        """
        there = any(name.startswith(prefix) for name in self.tensors)
        named = any(name.endswith(_WITH_HEAD) for name in self._architectures)
        if there or named or not (self.tensors or self._architectures):
            return True
        self.say(
            "note: the files have no projection to the vocabulary: config.model.has_head is False; "
            "the model gives hidden states, and can't score, generate or be trained without one"
        )
        return False

    def ignore(self, *names: str) -> None:
        """Drop keys that make no difference to this family."""
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        """Check that every key was read, is unset, or has no effect with its value."""
        left = {
            key: value
            for key, value in self._left.items()
            if value is not None and (key not in _OFF or value != _OFF[key])
        }
        if left:
            listed = ", ".join(f"{key} = {value!r}" for key, value in sorted(left.items()))
            hint = "" if self._part else " (--ignore-key=KEY reads one as if it were not there)"
            raise ValueError(f"{self._file} has keys that mean nothing here: {listed}{hint}")
