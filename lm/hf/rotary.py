"""Rotary positions as config.json tells them: `rope_theta` and `rope_scaling`, or
`rope_parameters`.
"""

from __future__ import annotations

from typing import Any

from lm.hf.keys import StrictConfigReader

# our field: their key
_LENGTH = {"original_length": "original_max_position_embeddings"}
_FIELDS: dict[str, dict[str, str]] = {
    "none": {},
    "linear": {"factor": "factor"},
    "llama3": {
        **{"factor": "factor", "low_frequency_factor": "low_freq_factor"},
        **{"high_frequency_factor": "high_freq_factor", **_LENGTH},
    },
    "yarn": {"factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow", **_LENGTH},
}
_NAMES = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


def from_hf(keys: StrictConfigReader, *, theta: float = 10_000.0) -> dict[str, Any]:
    """The fields of `config.model.rotary`; `theta` where config.json has none."""
    length = keys.take("max_position_embeddings")
    new = keys.take("rope_parameters", None)
    tree = dict(new or {})
    tree.setdefault("rope_theta", keys.take("rope_theta", theta))
    tree.update(keys.take("rope_scaling", None) or {})
    return {"max_length": length, **_fields(tree, length)}


def _fields(tree: dict[str, Any], length: int) -> dict[str, Any]:
    parts = StrictConfigReader(tree, part="rope_parameters")
    old_name = parts.take("type", "default")
    scaling = parts.translate("rope_type", _NAMES, old_name)
    fields = {"rotary.theta": float(parts.take("rope_theta")), "rotary.scaling": scaling}
    for name, key in _FIELDS[scaling].items():
        default = length if name == "original_length" else _DEFAULTS.get(name)
        value = parts.take(key, default)
        if value is None:
            raise ValueError(f"config.json has a rope_type of {scaling!r} without {key}")
        fields[f"rotary.{name}"] = int(value) if name == "original_length" else float(value)
    parts.expect("partial_rotary_factor", 1.0)
    for name in ("attention_factor", "mscale", "mscale_all_dim"):  # lm's is 0.1 ln(factor) + 1
        parts.expect(name, None)
    parts.expect("truncate", True)
    parts.finish()
    return fields


def to_hf(model: Any) -> dict[str, Any]:
    """The keys of a resolved `config.model` that `from_hf` reads, as transformers 4 and 5 know
    them.
    """
    rotary = model.rotary
    tree: dict[str, Any] = {
        "max_position_embeddings": model.max_length,
        "rope_theta": rotary.theta,
        "rope_scaling": None,
    }
    if rotary.scaling != "none":
        fields = {key: getattr(rotary, name) for name, key in _FIELDS[rotary.scaling].items()}
        tree["rope_scaling"] = {"rope_type": rotary.scaling, **fields}
    return tree


def both(keys: StrictConfigReader) -> dict[str, Any]:
    """As `from_hf`, for models whose local layers have a base of their own (Gemma 3)."""
    length = keys.take("max_position_embeddings")
    new = keys.take("rope_parameters", None) or {}
    whole = {"rope_theta": keys.take("rope_theta", 1_000_000.0)} | (new.get("full_attention") or {})
    whole.update(keys.take("rope_scaling", None) or {})
    local = {"rope_theta": keys.take("rope_local_base_freq", 10_000.0)}
    local |= new.get("sliding_attention") or {}
    if unknown := set(new) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"config.json has rope_parameters of {', '.join(sorted(unknown))}")
    own = StrictConfigReader(local, part="rope_parameters")
    own.expect("rope_type", "default")
    theta = float(own.take("rope_theta"))
    own.finish()
    return {"max_length": length, **_fields(whole, length), "rotary.local_theta": theta}
