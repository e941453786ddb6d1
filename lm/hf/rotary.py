"""Rotary positions in config.json: `rope_theta` and `rope_scaling`, or `rope_parameters`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm.hf.family import KeyGroup
from lm.hf.keys import Fields, Json, StrictConfigReader

if TYPE_CHECKING:
    from lm.models.decoder import Config

# {rope_type: {field of config.model.rotary: key}}
_LENGTH = {"original_length": "original_max_position_embeddings"}
FIELDS: dict[str, dict[str, str]] = {
    "none": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        **_LENGTH,
    },
    "yarn": {"factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow", **_LENGTH},
}
_NAMES = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


def from_hf(reader: StrictConfigReader, new: Json | None, length: int) -> Fields:
    """`config.model.rotary`. new: `rope_parameters`, of which other keys take the place in old
    files. length: the model's longest.
    """
    tree = {"rope_theta": reader.take("rope_theta", 10_000.0), **(new or {})}
    tree |= reader.take("rope_scaling", None) or {}
    parameters = StrictConfigReader(tree, part="rope_parameters")
    old_name = parameters.take("type", "default")
    scaling = parameters.translate("rope_type", _NAMES, old_name)
    fields = {"rotary.theta": float(parameters.take("rope_theta")), "rotary.scaling": scaling}
    for name, key in FIELDS[scaling].items():
        default = length if name == "original_length" else _DEFAULTS.get(name)
        value = parameters.take(key, default)
        if value is None:
            raise ValueError(f"config.json has a rope_type of {scaling!r} without {key}")
        fields[f"rotary.{name}"] = int(value) if name == "original_length" else float(value)
    parameters.expect("partial_rotary_factor", 1.0)
    for name in ("attention_factor", "mscale", "mscale_all_dim"):  # lm's is 0.1 ln(factor) + 1
        parameters.expect(name, None)
    parameters.expect("truncate", True)
    parameters.finish()
    return fields


def _read(reader: StrictConfigReader, fields: Fields) -> Fields:
    return from_hf(reader, reader.take("rope_parameters", None), fields["max_length"])


def to_hf(model: Config) -> Json:
    """The keys as transformers 4 and 5 know them."""
    rotary, scaling = model.rotary, None
    if rotary.scaling != "none":
        fields = {key: getattr(rotary, name) for name, key in FIELDS[rotary.scaling].items()}
        scaling = {"rope_type": rotary.scaling, **fields}
    return {"rope_theta": rotary.theta, "rope_scaling": scaling}


KEYS = KeyGroup(_read, to_hf)
