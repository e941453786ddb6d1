"""Sizes of activations, and of their change in the first steps, against width or depth.

    python scripts/coord_check.py --config=configs/tiny.py --widths=64,128,256,512 --steps=5 \\
        --out=runs/coordinates

The config is the base model; its schedule is left out. Under mup the exponents of the changes are
near 0; under the standard parametrization they are not. Writes OUT.png and OUT.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from lm import cli
from lm.config import command_line
from lm.telemetry import jsonl

_CONFIG = command_line.ConfigFlag()
_WIDTHS = flags.DEFINE_list("widths", [], "Values of embed_dim, with more heads of one width.")
_HEAD_DIMS = flags.DEFINE_list("head-dims", [], "Instead: values of embed_dim, with wider heads.")
_DEPTHS = flags.DEFINE_list("depths", [], "Instead: values of num_layers.")
_STEPS = flags.DEFINE_integer("steps", 5, "Steps of training.", lower_bound=1)
_PARAMETRIZATIONS = flags.DEFINE_list("parametrizations", ["mup", "standard"], "Those to compare.")
_OUT = flags.DEFINE_string("out", "coordinates", "Where the results go, without an ending.")


def main(argv: Sequence[str]) -> int:
    del argv
    given = {"width": _WIDTHS.value, "head_dim": _HEAD_DIMS.value, "depth": _DEPTHS.value}
    along = [name for name, sizes in given.items() if sizes]
    config = _CONFIG.value
    if len(along) != 1:
        raise app.UsageError("one of --widths, --head-dims and --depths is needed")
    import jax

    from lm.scaling import coord_check

    sizes = [int(size) for size in given[along[0]]]
    checks = [
        coord_check.check(
            config,
            jax.devices(),
            parametrization=name,
            sizes=sizes,
            num_steps=_STEPS.value,
            along=along[0],
        )
        for name in _PARAMETRIZATIONS.value
    ]
    print(coord_check.table(checks))
    out = Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(jsonl.dumps([found.to_json() for found in checks], indent=1))
    coord_check.draw(checks, f"{out}.png")
    print(f"{out}.png, {out}.json")
    return 0


if __name__ == "__main__":
    cli.run_with_config(main, _CONFIG)
