"""A family of Hugging Face models: config.json beside `config.model`, tensors beside parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lm.hf.keys import REQUIRED, Fields, Json, StrictConfigReader

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# fields that may be unset, and the property that then has their value
_PROPERTIES = {
    "num_kv_heads": "kv_heads",
    "head_dim": "head_size",
    "mlp_dim": "mlp_size",
    "moe.mlp_dim": "expert_size",
    "layer_pattern": "layer_kinds",
}
_UNSET = {
    "query_scale": lambda model: model.head_size**-0.5,
    "rotary.local_theta": lambda model: model.rotary.theta,
    "num_encoder_layers": lambda model: model.num_layers,
    "vision.mlp_dim": lambda model: 4 * model.vision.embed_dim,
    "text.mlp_dim": lambda model: 4 * model.text.embed_dim,
}


def effective_value(model: Any, path: str) -> Any:
    """The value of a field of a resolved `config.model`, and what an unset one amounts to."""
    if hasattr(model, name := _PROPERTIES.get(path, "")):
        return getattr(model, name)
    value = functools.reduce(getattr, path.split("."), model)
    return _UNSET[path](model) if value is None and path in _UNSET else value


class Key(NamedTuple):
    """A key of config.json that has the value of a field of `config.model`."""

    name: str
    field: str | tuple[str, ...]  # several: they have one value
    default: Any = REQUIRED  # where the key is unset; a function: of the fields before this one
    words: Mapping[str, str] | None = None  # {value of the key: value of the field}

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,) if isinstance(self.field, str) else self.field

    def read(self, reader: StrictConfigReader, before: Fields) -> Fields:
        """The fields of a config.json. before: the fields that earlier keys gave."""
        default = self.default(before) if callable(self.default) else self.default
        if self.words is None:
            return dict.fromkeys(self.fields, reader.take(self.name, default))
        return dict.fromkeys(self.fields, reader.translate(self.name, self.words, default))

    def write(self, model: DataclassInstance) -> Json:
        """The key for a resolved `config.model`, with the first of several words."""
        value = effective_value(model, self.fields[0])
        words = (word for word, same in (self.words or {}).items() if same == value)
        return {self.name: next(words, value)}


class KeyGroup(NamedTuple):
    """Keys of config.json whose values say something together; as `Key`."""

    read: Callable[[StrictConfigReader, Fields], Fields]
    write: Callable[[Any], Json] = lambda model: {}


class Section(NamedTuple):
    """The object under a key of config.json, with keys of its own; as `Key`.

    In files of transformers 4 a second object, `NAME_dict`, may repeat some of them.
    """

    name: str
    keys: tuple[Key | KeyGroup, ...]
    expected: Mapping[str, object]  # keys with one value
    ignored: tuple[str, ...] = ()

    def read(self, reader: StrictConfigReader, before: Fields) -> Fields:
        tree, again = reader.take(self.name, {}), reader.take(f"{self.name}_dict", {})
        for key in tree.keys() & again.keys():
            if tree[key] != again[key]:
                raise ValueError(
                    f"config.json has {key} = {tree[key]!r} in {self.name}, and {again[key]!r} in "
                    f"{self.name}_dict"
                )
        inner = StrictConfigReader({**tree, **again}, reader.tensors, part=self.name)
        for key, value in self.expected.items():
            inner.expect(key, value)
        inner.ignore(*self.ignored)
        fields: Fields = {}
        for key in self.keys:
            fields |= key.read(inner, before | fields)
        inner.finish()
        return fields

    def write(self, model: DataclassInstance) -> Json:
        tree: Json = {}
        for key in self.keys:
            tree |= key.write(model)
        return {self.name: tree}


@dataclasses.dataclass(frozen=True)
class Family:
    """The conversion between the models of one `model_type` and a component of `lm.models`."""

    model_type: str
    model: str  # the component: decoder, say
    architecture: str  # the class that `transformers` loads, for config.json
    bare: str  # its class without the projection to the vocabulary
    prefix: str  # of names of tensors, which a checkpoint of the bare class lacks
    keys: tuple[Key | KeyGroup | Section, ...]
    # {module, or parameter: that of the checkpoint}, of all models: see lm/hf/table.py
    modules: Callable[[Any], Mapping[str, str]]
    transposed: bool = True  # weights of layers are [out, in]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)  # {name: the same tensor}
    fields: Mapping[str, object] = dataclasses.field(default_factory=dict)  # of all its models
    defaults: Mapping[str, object] = dataclasses.field(default_factory=dict)  # of unset keys
    expected: Mapping[str, object] = dataclasses.field(default_factory=dict)  # keys with one value
    ignored: tuple[str, ...] = ()  # keys that make no difference
    head: str = ""  # how names of the vocabulary projection's tensors start
    buffers: str = ""  # pattern of names of tensors that hold no parameters
    renamed: tuple[tuple[str, str], ...] = ()  # (pattern, replacement) of names of tensors
    # {tensor: its first dimensions of size 1, which the parameter lacks}
    ones: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # of models of pictures: the class and its own keys in preprocessor_config.json, of a size
    image_processor: Callable[[int], Json] | None = None
    reads_text: bool = True
    objective: Mapping[str, object] = dataclasses.field(default_factory=dict)  # of its pretraining
    # of a text model inside of a model with several kinds of input
    section: str = ""  # its key in config.json; "": there are no other kinds
    ignored_beside: tuple[str, ...] = ()  # keys beside that section
    other_tensors: str = ""  # pattern of names

    def from_hf(self, reader: StrictConfigReader) -> Fields:
        """The fields of `config.model`, {path: value}, of a config.json."""
        reader.fill(self.defaults)
        for name, value in self.expected.items():
            reader.expect(name, value)
        reader.ignore(*self.ignored)
        fields: Fields = dict(self.fields)
        for key in self.keys:
            fields |= key.read(reader, fields)
        if self.head:
            fields["has_head"] = fields.get("tie_embeddings") or reader.has_head(self.head)
        return fields

    def to_hf(self, model: DataclassInstance) -> Json:
        """The config.json of a resolved `config.model`."""
        named = self.architecture if getattr(model, "has_head", True) else self.bare
        tree: Json = {"architectures": [named], "model_type": self.model_type}
        for key in self.keys:
            tree |= key.write(model)
        return tree
