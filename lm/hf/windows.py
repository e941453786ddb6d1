"""The layers with a window: `sliding_window` by itself, or with `layer_types`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm.hf.keys import Fields, Json, StrictConfigReader

if TYPE_CHECKING:
    from lm.models.decoder import Config

_KINDS = {"full_attention": "global", "sliding_attention": "local"}


def from_hf(layer_types: list[str] | None, window: int | None, num_layers: int) -> Fields:
    """`layer_pattern` and `window` for the `layer_types` of a config.json.

    Without layer types all layers are local where there is a window.
    """
    if layer_types is None:
        layer_types = ["full_attention" if window is None else "sliding_attention"]
    if unknown := set(layer_types) - set(_KINDS):
        raise ValueError(
            f"config.json has layer_types {sorted(unknown)}, of which there is only {list(_KINDS)}"
        )
    pattern = tuple(_KINDS[kind] for kind in layer_types)
    if "local" in pattern and window is None:
        raise ValueError("config.json has layers of sliding_attention and sliding_window = None")
    return {
        "layer_pattern": period(pattern),
        "window": window if "local" in pattern[:num_layers] else None,
    }


def period(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest pattern whose repetition is `kinds`."""
    repeats = (
        n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds))
    )
    return kinds[: next(repeats)]


def layer_types(model: Config) -> list[str]:
    """`layer_types` of a resolved `config.model`."""
    names = {value: key for key, value in _KINDS.items()}
    return [names[kind] for kind in model.layer_kinds]


def optional_from_hf(reader: StrictConfigReader, num_layers: int) -> Fields:
    """The same for Qwen 2 and 3: a window only with `use_sliding_window`, and in layers from
    `max_window_layers` on where no `layer_types` say otherwise.
    """
    window, first = reader.take("sliding_window", None), reader.take("max_window_layers", 28)
    types, used = reader.take("layer_types", None), reader.take("use_sliding_window", False)
    if not used or window is None:
        types, window = ["full_attention"] * num_layers if types is None else types, None
    if types is None:
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    return from_hf(types, window, num_layers)


def optional_to_hf(model: Config) -> Json:
    """The keys that `optional_from_hf` reads."""
    return {
        "use_sliding_window": model.window is not None,
        "sliding_window": model.window,
        "layer_types": layer_types(model),
    }
