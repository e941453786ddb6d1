"""The two-way conversion between config.json and `config.model`, for all families.

`config.model` has three kinds of fields: those that make the function that the model computes
(its structure), those of training alone, and those of how it is computed. A config.json knows the
first, some of the second, and nothing of the third.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lm.config import conversion
from lm.config.components import names_in
from lm.config.tree import ConfigTree, leaves
from lm.hf import rotary
from lm.hf.family import Family, effective_value
from lm.hf.keys import Fields, Json, Say, StrictConfigReader, quiet

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TRAINING = (
    *("dropout", "attention_dropout", "init_std", "embed_init_std"),
    *("moe.balance_loss", "moe.sequence_balance_loss", "moe.z_loss"),
    *("base_embed_dim", "base_num_layers", "base_head_dim"),
    *("init_logit_scale", "init_logit_bias", "max_logit_scale"),
)
PREPROCESSING = ("image_mean", "image_std")  # in a file of its own: lm/hf/pictures.py
COMPUTE = (
    *("dtype", "remat", "attention_kernel", "sequence_parallel", "sequence_balance"),
    *("scan_unroll", "pipeline", "moe.dispatch", "moe.capacity_factor"),
)


@functools.cache
def families() -> dict[str, Family]:
    """{`model_type`: family}: the modules of lm/hf with a `FAMILY`."""
    modules = {name: importlib.import_module(f"lm.hf.{name}") for name in names_in("lm.hf")}
    return {name: module.FAMILY for name, module in modules.items() if hasattr(module, "FAMILY")}


def names() -> list[str]:
    """The families that models are exported as, sorted."""
    return [name for name, kind in families().items() if not kind.section]


def family(model_type: str) -> Family:
    """The family of a `model_type`; of a model with several kinds of input, that of its text part.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    if model_type not in families():
        parts = {name: " (its text part)" if f.section else "" for name, f in families().items()}
        listed = ", ".join(name + part for name, part in parts.items())
        raise ValueError(f"no family {model_type!r} in lm/hf; there are: {listed}")
    return families()[model_type]


def model_section(
    tree: Json,
    tensors: Iterable[str] = (),
    *,
    ignored: Sequence[str] = (),
    say: Say = quiet,
) -> ConfigTree:
    """`config.model` of a config.json beside these tensors; fields that it has no keys for have
    their defaults.

    ignored: keys that are read as if they were not there. say: takes notes for the user.

    Raises:
        ValueError: an unknown family, keys and values that can't be represented, or keys to ignore
        that are not there.
    """
    kind = family(tree.get("model_type", "none"))
    for key in ignored:
        if key not in tree:
            raise ValueError(f"--ignore-key={key}: config.json has no such key")
        say(f"ignored in config.json: {key} = {tree[key]!r}")
    tree = {key: value for key, value in tree.items() if key not in ignored}
    if kind.section:
        whole = StrictConfigReader(tree)
        whole.ignore(*kind.ignored_beside)
        tie = whole.take("tie_word_embeddings", None)
        tree = {"tie_word_embeddings": tie, **whole.take(kind.section)}
        whole.finish()
    reader = StrictConfigReader(tree, tensors, say=say)
    fields = kind.from_hf(reader)
    reader.finish()
    section: ConfigTree = conversion.default(model=kind.model).model
    section.update_from_flattened_dict(fields)
    return section


def hf_config(kind: Family, section: ConfigTree) -> Json:
    """The config.json of a `config.model`.

    Raises:
        ValueError: it has values that this family can't represent; the message lists them.
    """
    model = resolve(section)
    if section.name != kind.model:
        raise ValueError(f"config.model.name is {section.name!r}, this family is {kind.model!r}")
    tree = kind.to_hf(model)
    # the one part of a model that no key tells
    has_pooler = getattr(model, "pooler_dim", 0) > 0
    tensors = [f"{kind.modules(model)['pooler']}.weight"] if has_pooler else []
    try:
        represented = _structure(resolve(model_section(tree, tensors)))
    except ValueError as error:
        raise ValueError(f"no {kind.architecture} is like this model: {error}") from None
    wrong = [
        f"config.model.{path} = {value!r}, {kind.architecture} has {represented.get(path)!r}"
        for path, value in _structure(model).items()
        if not _is_same(value, represented.get(path))
    ]
    if wrong:
        raise ValueError(f"no {kind.architecture} is like this model:\n  " + "\n  ".join(wrong))
    return tree


def find_family(section: ConfigTree) -> str:
    """The first family, by name, that can represent a `config.model`.

    Raises:
        ValueError: none can; the message gives the reason for each.
    """
    reasons = []
    for name in names():
        try:
            hf_config(family(name), section)
            return name
        except ValueError as error:
            reasons.append(f"{name}: {error}")
    raise ValueError("no family can represent config.model:\n" + "\n".join(reasons))


def resolve(section: ConfigTree) -> Any:
    """The frozen config of a section `config.model`."""
    config = conversion.default(model=section.name)
    config.model = section
    return conversion.resolve(config).model


def rename(found: Iterable[str], kind: Family) -> dict[str, str]:
    """{a tensor's name in the family's table: its name in the checkpoint}, without those of other
    kinds of input.
    """
    renamed = {
        original: functools.reduce(lambda name, rule: re.sub(*rule, name), kind.renamed, original)
        for original in found
        if not re.fullmatch(kind.other_tensors, original)
    }
    bare = not any(name.startswith(kind.prefix) for name in renamed.values())
    names: dict[str, str] = {}
    for original, name in renamed.items():
        if bare and not name.startswith(("lm_head.", "cls.")):
            name = kind.prefix + name
        if name in names:
            raise ValueError(f"{original} and {names[name]} are the same tensor, {name}")
        names[name] = original
    return names


def _structure(model: DataclassInstance) -> Fields:
    """{path: value} of the fields that make the function."""
    flat = {path: effective_value(model, path) for path, _ in leaves(dataclasses.asdict(model))}
    experts = flat.get("moe.num_experts", 0)
    skipped = {*TRAINING, *COMPUTE, *PREPROCESSING, "mlp_dim" if experts else "moe"}
    used = rotary.FIELDS.get(flat.get("rotary.scaling", ""), {})
    skipped |= {f"rotary.{n}" for names in rotary.FIELDS.values() for n in names if n not in used}
    if flat.get("positions") != "rotary":
        skipped.add("rotary")
    if flat.get("positions") != "relative":
        skipped |= {"relative_buckets", "relative_max_distance"}
    if "local" not in flat.get("layer_pattern", ()):
        skipped |= {"window", "rotary.local_theta"}
    return {
        path: value
        for path, value in flat.items()
        if not any(path == s or path.startswith(f"{s}.") for s in skipped)
    }


def _is_same(a: object, b: object) -> bool:
    """Equal, but for the rounding of x ** -0.5."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)
    return a == b
