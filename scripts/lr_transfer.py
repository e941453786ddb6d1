"""The best learning rate at every width, under mup and the standard parametrization.

    python scripts/lr_transfer.py --config=configs/transfer.py --widths=64,128,256,512 \\
        --rates=-9,-8,-7,-6,-5 --seeds=0,1,2 --out=runs/transfer

The config is the base model. Each run is appended to OUT.jsonl when it is done, and not done twice:
after a kill the same command goes on. Ends with OUT.png and a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lm import cli
from lm.config import command_line

_CONFIG = command_line.ConfigFlag()
_WIDTHS = flags.DEFINE_list("widths", ["64", "128", "256", "512"], "Values of embed_dim.")
_RATES = flags.DEFINE_list(
    "rates", ["-9", "-8", "-7", "-6", "-5"], "Learning rates, as powers of two."
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of weights and data.")
_PARAMETRIZATIONS = flags.DEFINE_list("parametrizations", ["mup", "standard"], "Those to compare.")
_OUT = flags.DEFINE_string("out", "transfer", "Where the results go, without an ending.")


def main(argv: Sequence[str]) -> int:
    del argv
    config = _CONFIG.value
    import jax

    from lm.scaling import lr_transfer

    runs = lr_transfer.sweep(
        config,
        jax.devices(),
        Path(f"{_OUT.value}.jsonl"),
        parametrizations=_PARAMETRIZATIONS.value,
        widths=[int(width) for width in _WIDTHS.value],
        rates=[2.0 ** float(rate) for rate in _RATES.value],
        seeds=[int(seed) for seed in _SEEDS.value],
    )
    print(lr_transfer.table(lr_transfer.best(runs)))
    lr_transfer.draw(runs, f"{_OUT.value}.png")
    print(f"{_OUT.value}.png, {_OUT.value}.jsonl")
    return 0


if __name__ == "__main__":
    cli.run_with_config(main, _CONFIG)
