"""Which layers have a window: `sliding_window` alone, or with `layer_types`."""

from __future__ import annotations

from typing import Any

from lm.hf.keys import StrictConfigReader

_KINDS = {"full_attention": "global", "sliding_attention": "local"}


def from_hf(kinds: list[str] | None, window: int | None, num_layers: int) -> dict[str, Any]:
    """`layer_pattern` and `window` of layers of these `kinds`, in their words; None: all local
    where there is a window.
    """
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"]
    if unknown := set(kinds) - set(_KINDS):
        raise ValueError(
            f"config.json has layer_types {sorted(unknown)}, of which there is only {list(_KINDS)}"
        )
    pattern = tuple(_KINDS[kind] for kind in kinds)
    if "local" in pattern and window is None:
        raise ValueError("config.json has layers of sliding_attention and sliding_window = None")
    return {
        "layer_pattern": period(pattern),
        "window": window if "local" in pattern[:num_layers] else None,
    }


def period(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest pattern that gives `kinds` when it is repeated."""
    repeats = (
        n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds))
    )
    return kinds[: next(repeats)]


def optional(keys: StrictConfigReader, num_layers: int) -> dict[str, Any]:
    """Of Qwen 2 and 3: a window only with `use_sliding_window`, in layers from
    `max_window_layers` on where no `layer_types` say otherwise.
    """
    window, first = keys.take("sliding_window", None), keys.take("max_window_layers", 28)
    kinds, used = keys.take("layer_types", None), keys.take("use_sliding_window", False)
    if not used or window is None:
        kinds, window = ["full_attention"] * num_layers if kinds is None else kinds, None
    if kinds is None:
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    return from_hf(kinds, window, num_layers)


def kinds(model: Any) -> list[str]:
    """`layer_types` of a resolved `config.model`."""
    names = {value: key for key, value in _KINDS.items()}
    return [names[kind] for kind in model.layer_kinds]
