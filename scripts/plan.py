"""Know before you launch: the real compiler says what a run needs, on devices that aren't here.

    python scripts/plan.py --config=configs/llama3.py:70b --topology=v5p:8x8x8
    python scripts/plan.py --config=configs/gpt2.py:124m --topology=v5e:4x4 --json=plan.json \
        --picture=plan.png --config.model.remat=full

Compiles the actual train step (with --decode the decode step) from shapes alone, so neither data
nor chips are needed, and reports memory by what it is for, collectives by mesh axis, the least time
by what binds it, warnings, and what to try next. TPU topologies need libtpu, GPU topologies
jax[cuda13]; see lm/aot/topology.py for their names. Plans are kept in ~/.cache/lm/plan.

The exit code is 0 where the step fits and 1 where it doesn't.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import app, flags
from ml_collections import config_flags

from lm import runtime

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file with get_config(arg), as FILE or FILE:ARG."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Devices: v5p:4x4x4, 2xv5e:16x16, h100:64, h100:8x4, cpu:8."
)
_DECODE = flags.DEFINE_bool("decode", False, "Plan a step of generation instead of training.")
_BATCH = flags.DEFINE_integer("decode_batch", 8, "--decode: rows.")
_LENGTH = flags.DEFINE_integer("decode_length", 2048, "--decode: slots of the cache.")
_JSON = flags.DEFINE_string("json", None, "Also write the plan to this file.")
_PICTURE = flags.DEFINE_string("picture", None, "Also draw the plan to this PNG file.")
_FRESH = flags.DEFINE_bool("fresh", False, "Compile again, whatever is in the cache.")


def main(argv: Sequence[str]) -> int:
    del argv
    if _CONFIG.value is None or _TOPOLOGY.value is None:
        raise app.UsageError("--config=configs/NAME.py and --topology=NAME are needed")
    from lm.aot import plan as plans
    from lm.aot import report

    decode = plans.Decode(_BATCH.value, _LENGTH.value) if _DECODE.value else None
    name = flags.FLAGS["config"].config_filename  # pyright: ignore
    show = os.fdopen(os.dup(2), "w") if sys.stderr.isatty() else None
    make = plans.make if _FRESH.value else plans.cached
    made = make(_CONFIG.value, _TOPOLOGY.value, config_name=name, decode=decode, show=show)
    plan = made[0] if isinstance(made, tuple) else made
    print(report.page(plan), end="")
    if _JSON.value:
        Path(_JSON.value).write_text(plan.to_json())
    if _PICTURE.value:
        from lm.aot import picture

        picture.draw(plan, _PICTURE.value)
        print(f"\npicture: {_PICTURE.value}")
    return 0 if plan.fits else 1


if __name__ == "__main__":
    runtime.run_with_config(main)
