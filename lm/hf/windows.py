"""The layers with a window: `sliding_window` by itself, or with `layer_types`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm.hf.family import KeyGroup
from lm.hf.keys import Fields, Json, StrictConfigReader

if TYPE_CHECKING:
    from lm.models.decoder import Config

_KINDS = {"full_attention": "global", "sliding_attention": "local"}


def from_hf(layer_types: list[str], window: int | None, num_layers: int) -> Fields:
    """`layer_pattern` and `window` for the `layer_types` of a config.json."""
    if unknown := set(layer_types) - set(_KINDS):
        raise ValueError(
            f"config.json has layer_types {sorted(unknown)}, of which there is only {list(_KINDS)}"
        )
    pattern = tuple(_KINDS[kind] for kind in layer_types)
    if "local" in pattern and window is None:
        raise ValueError("config.json has layers of sliding_attention and sliding_window = None")
    return {
        "layer_pattern": _period(pattern),
        "window": window if "local" in pattern[:num_layers] else None,
    }


def _period(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest pattern whose repetition is `kinds`."""
    repeats = (
        n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds))
    )
    return kinds[: next(repeats)]


def to_hf(model: Config) -> Json:
    """`sliding_window` and `layer_types` of a resolved `config.model`."""
    names = {value: key for key, value in _KINDS.items()}
    return {
        "sliding_window": model.window,
        "layer_types": [names[kind] for kind in model.layer_kinds],
    }


def in_every_layer(default: int | None) -> KeyGroup:
    """`sliding_window` by itself: no layer has one where it is null. default: where it is unset."""

    def read(reader: StrictConfigReader, fields: Fields) -> Fields:
        window = reader.take_or_none("sliding_window", default)
        kind = "full_attention" if window is None else "sliding_attention"
        return from_hf([kind], window, fields["num_layers"])

    return KeyGroup(read, lambda model: {"sliding_window": model.window})


def _read_optional(reader: StrictConfigReader, fields: Fields) -> Fields:
    window, first = reader.take("sliding_window", None), reader.take("max_window_layers", 28)
    types, used = reader.take("layer_types", None), reader.take("use_sliding_window", False)
    num_layers = fields["num_layers"]
    if not used or window is None:
        first, window = num_layers, None
    if types is None:
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    return from_hf(types, window, num_layers)


# Qwen 2 and 3: a window only with `use_sliding_window`, and in layers from `max_window_layers` on
# where no `layer_types` say otherwise.
OPTIONAL = KeyGroup(
    _read_optional,
    lambda model: {"use_sliding_window": model.window is not None, **to_hf(model)},
)
