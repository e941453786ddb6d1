"""The two-way conversion between config.json and `config.model`, for all families.

`config.model` has three kinds of fields: those that make the function that the model computes
(its structure), those of training alone, and those of how it is computed. A config.json knows the
first, some of the second, and nothing of the third.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import lm.hf
from lm.config import conversion
from lm.hf.keys import Say, StrictConfigReader, quiet, without
from lm.hf.nested import NESTED, text_config
from lm.hf.table import WeightMapping

TRAINING = (
    *("dropout", "attention_dropout", "init_std", "embed_init_std"),
    *("moe.balance_loss", "moe.z_loss"),
    *("base_embed_dim", "base_num_layers", "base_head_dim"),
)
COMPUTE = (
    *("dtype", "remat", "attention_kernel", "sequence_parallel", "sequence_balance"),
    *("scan_unroll", "pipeline", "moe.dispatch", "moe.capacity_factor"),
)
# fields that mean something only where another one has one of these values
_CONDITIONS = (
    ("rotary", "positions", ("rotary",)),
    ("rotary.factor", "rotary.scaling", ("linear", "llama3", "yarn")),
    ("rotary.original_length", "rotary.scaling", ("llama3", "yarn")),
    ("rotary.low_frequency_factor", "rotary.scaling", ("llama3",)),
    ("rotary.high_frequency_factor", "rotary.scaling", ("llama3",)),
    ("rotary.beta_fast", "rotary.scaling", ("yarn",)),
    ("rotary.beta_slow", "rotary.scaling", ("yarn",)),
    ("relative_buckets", "positions", ("relative",)),
    ("relative_max_distance", "positions", ("relative",)),
)
# fields that may be unset, and the property that then says what they are
_RESOLVED = {
    "num_kv_heads": "kv_heads",
    "head_dim": "head_size",
    "mlp_dim": "mlp_size",
    "moe.mlp_dim": "expert_size",
    "layer_pattern": "layer_kinds",
}


class Family(Protocol):
    """What a module of a family has; see the package's docstring."""

    MODEL: str
    ARCHITECTURE: str
    BARE: str
    PREFIX: str
    BUFFERS: str
    RENAMED: tuple[tuple[str, str], ...]

    @staticmethod
    def from_hf(keys: StrictConfigReader) -> dict[str, Any]: ...
    @staticmethod
    def to_hf(model: Any) -> dict[str, Any]: ...
    @staticmethod
    def weight_map(model: Any) -> list[WeightMapping]: ...
    @staticmethod
    def aliases(model: Any) -> dict[str, str]: ...


def names() -> list[str]:
    """The families: their modules here have what `Family` lists."""
    found = [module.name for module in pkgutil.iter_modules(lm.hf.__path__)]
    return [
        name for name in found if hasattr(importlib.import_module(f"lm.hf.{name}"), "weight_map")
    ]


def family(model_type: str) -> Family:
    """The family of a `model_type`: of its text part where it has several.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    if model_type not in names() and model_type not in NESTED:
        parts = [f"{name} (its text part)" for name in NESTED]
        listed = ", ".join(sorted([*names(), *parts]))
        raise ValueError(f"no family {model_type!r} in lm/hf; there are: {listed}")
    name = NESTED[model_type].family if model_type in NESTED else model_type
    module: Any = importlib.import_module(f"lm.hf.{name}")
    return module


def model_section(
    tree: dict[str, Any],
    tensors: Iterable[str] = (),
    *,
    ignored: Sequence[str] = (),
    say: Say = quiet,
) -> Any:
    """`config.model` of a config.json beside these tensors: its structure, and defaults for all
    else.

    ignored: keys that are read as if they were not there. say: takes notes for the user.

    Raises:
        ValueError: an unknown family, or keys and values that can't be represented.
    """
    kind = family(tree.get("model_type", "none"))
    keys = StrictConfigReader(text_config(without(tree, ignored, say)), tensors, say=say)
    fields = kind.from_hf(keys)
    keys.finish()
    section: Any = conversion.default(model=kind.MODEL).model
    section.update_from_flattened_dict(fields)
    return section


def hf_config(kind: Family, section: Any) -> dict[str, Any]:
    """The config.json of a `config.model`.

    Raises:
        ValueError: it has values that this family can't represent; the message lists them.
    """
    model = resolve(section)
    if section.name != kind.MODEL:
        raise ValueError(f"config.model.name is {section.name!r}, this family is {kind.MODEL!r}")
    tree = kind.to_hf(model)
    here = _structure(model)
    try:
        back = _structure(
            resolve(model_section(tree, {row.tensor for row in kind.weight_map(model)}))
        )
    except ValueError as error:
        raise ValueError(f"no {kind.ARCHITECTURE} is like this model: {error}") from None
    wrong = [
        f"config.model.{path} = {value!r}, {kind.ARCHITECTURE} has {back.get(path)!r}"
        for path, value in here.items()
        if not _same(value, back.get(path))
    ]
    if wrong:
        raise ValueError(f"no {kind.ARCHITECTURE} is like this model:\n  " + "\n  ".join(wrong))
    has_head = getattr(model, "has_head", True)
    return {"architectures": [kind.ARCHITECTURE if has_head else kind.BARE], **tree}


def find_family(section: Any) -> str:
    """The first family, by name, that can represent a `config.model`.

    Raises:
        ValueError: none can; the message says for each of them why.
    """
    reasons = []
    for name in names():
        try:
            hf_config(family(name), section)
            return name
        except ValueError as error:
            reasons.append(f"{name}: {error}")
    raise ValueError("no family can represent config.model:\n" + "\n".join(reasons))


def resolve(section: Any) -> Any:
    """The frozen config of a section `config.model`."""
    config = conversion.default(model=section.name)
    config.model = section
    return conversion.resolve(config).model


def rename(names_there: list[str], kind: Family) -> dict[str, str]:
    """{the name that the table has: the name in the files}, of all tensors."""
    found = {}
    bare = not any(name.startswith(kind.PREFIX) for name in names_there)
    for there in names_there:
        name = there
        for pattern, replacement in kind.RENAMED:
            name = re.sub(pattern, replacement, name)
        if bare and not name.startswith(("lm_head.", "cls.")):
            name = kind.PREFIX + name
        if name in found:
            raise ValueError(f"{there} and {found[name]} are the same tensor, {name}")
        found[name] = there
    return found


def _structure(model: Any) -> dict[str, Any]:
    """{path: value} of the fields that make the function."""
    flat = dict(_leaves(model, ""))
    for path, name in _RESOLVED.items():
        if path in flat and hasattr(model, name):
            flat[path] = getattr(model, name)
    if flat.get("query_scale", 0) is None:
        flat["query_scale"] = model.head_size**-0.5
    if flat.get("rotary.local_theta", 0) is None:
        flat["rotary.local_theta"] = flat["rotary.theta"]
    if flat.get("num_encoder_layers", 0) is None:
        flat["num_encoder_layers"] = model.num_layers
    experts = flat.get("moe.num_experts", 0)
    skipped = {
        *TRAINING,
        *COMPUTE,
        *(() if experts else ("moe",)),
        *(("mlp_dim",) if experts else ()),
    }
    skipped |= {path for path, where, values in _CONDITIONS if flat.get(where) not in values}
    if "local" not in flat.get("layer_pattern", ()):
        skipped |= {"window", "rotary.local_theta"}
    return {
        path: value
        for path, value in flat.items()
        if not any(path == s or path.startswith(f"{s}.") for s in skipped)
    }


def _leaves(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value


def _same(a: Any, b: Any) -> bool:
    """Equal, but for the rounding of x ** -0.5."""
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-12 * max(abs(a), abs(b))
    return a == b
