"""Plan a run with the real compiler for absent devices: memory, traffic, time, mesh search.

    python scripts/plan.py --config=configs/llama3.py:70b --topology=v5p:8x8x8
    python scripts/plan.py --config=configs/gpt2.py:124m --topology=v5e:4x4 --json=plan.json \\
        --picture=plan.png --config.model.remat=full

Compiles the actual train step (with --decode the decode step) from shapes, so neither data nor
chips are needed. Reports memory by purpose, collectives by mesh axis, bounds of the step's time
with its bottleneck, and warnings. TPU topologies need libtpu, GPU topologies jax[cuda13]; see
lm/planning/topology.py for their names. Plans are kept in ~/.cache/lm/plan.

--search looks for the fastest mesh, remat policy and number of micro-batches, --largest-batch for
the most rows that fit, --fewest-chips for the smallest slice of this kind of chip, whatever shape
was given; the last two also with --decode. Each compiles a few plans and shows all of them.

The exit code is 0 where the step fits and 1 where it doesn't.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from lm import cli
from lm.config import command_line

_CONFIG = command_line.ConfigFlag()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Devices: v5p:4x4x4, 2xv5e:16x16, h100:64, h100:8x4, cpu:8."
)
_DECODE = flags.DEFINE_bool("decode", False, "Plan a step of generation instead of training.")
_BATCH = flags.DEFINE_integer("decode-batch", 8, "--decode: rows.")
_LENGTH = flags.DEFINE_integer("decode-length", 2048, "--decode: slots of the cache.")
_JSON = flags.DEFINE_string("json", None, "Also write the plan to this file.")
_PICTURE = flags.DEFINE_string("picture", None, "Also draw the plan to this PNG file.")
_FRESH = flags.DEFINE_bool("fresh", False, "Compile again, whatever is in the cache.")
_TOKENS = flags.DEFINE_string("tokens", None, "Also say how many days so many tokens take: 15T.")
_SEARCH = flags.DEFINE_bool("search", False, "Find the fastest mesh, remat and micro-batch.")
_COMPILE = flags.DEFINE_integer("search-compiles", 4, "--search: candidates to compile.")
_LARGEST = flags.DEFINE_bool("largest-batch", False, "Find the most rows of a device that fit.")
_FEWEST = flags.DEFINE_bool("fewest-chips", False, "Find the smallest slice that fits.")


def main(argv: Sequence[str]) -> int:
    del argv
    if _CONFIG.value is None or _TOPOLOGY.value is None:
        raise app.UsageError("--config=configs/NAME.py and --topology=NAME are needed")
    from lm.planning import plan as plans
    from lm.planning import report
    from lm.telemetry import progress

    decode = plans.Decode(_BATCH.value, _LENGTH.value) if _DECODE.value else None
    name = _CONFIG.name
    # a stream of its own: what the compiler writes to the other one is kept for the plan
    show = progress.Progress(os.fdopen(os.dup(2), "w"), pause=30)

    def make(config: Any, topology: str, decode: plans.Decode | None) -> plans.Plan:
        return plans.make(
            config,
            topology,
            config_name=name,
            decode=decode,
            show=show,
            folder=None if _FRESH.value else plans.cache_folder(),
        )

    plan = _find(make, decode, show)
    if plan is None:
        return 1
    print(report.page(plan), end="")
    if _TOKENS.value:
        print("\n" + report.days(plan, _number(_TOKENS.value)))
    if _JSON.value:
        Path(_JSON.value).write_text(plan.to_json())
    if _PICTURE.value:
        from lm.planning import picture

        picture.save_picture(plan, _PICTURE.value)
        print(f"\npicture: {_PICTURE.value}")
    return 0 if plan.fits else 1


def _find(make: Any, decode: Any, show: Any) -> Any:
    """The plan that was asked for, by search or by its config; None where nothing fits."""
    from lm.planning import report, search, sizing

    config, topology = _CONFIG.value, str(_TOPOLOGY.value)
    if sum((_SEARCH.value, _LARGEST.value, _FEWEST.value)) > 1:
        raise app.UsageError("one of --search, --largest-batch and --fewest-chips")
    if _SEARCH.value:
        if decode is not None:
            raise app.UsageError("--search ranks training steps only, not --decode")
        found = search.search(config, topology, make, num_compiled=_COMPILE.value, show=show)
    elif _LARGEST.value or _FEWEST.value:
        look = sizing.largest_batch if _LARGEST.value else sizing.fewest_chips
        found = look(config, topology, make, decode=decode)
    else:
        return make(config, topology, decode)
    print(report.trials_page(found))
    return found.winner.plan if found.winner else None


def _number(text: str) -> float:
    """15T, 300B, 2.5e9."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    try:
        if text[-1:].upper() in scale:
            return float(text[:-1]) * scale[text[-1].upper()]
        return float(text)
    except ValueError:
        raise ValueError(f"--tokens={text} is no number such as 15T, 300B or 2.5e9") from None


if __name__ == "__main__":
    cli.run_with_config(main, _CONFIG)
