"""Steps that scripts/gpu_check.py measures: their configs, goals and plans."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.config import command_line
from lm.config.tree import ConfigTree

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LLAMA_1_3B = (
    "model.num_layers=24",
    "model.embed_dim=2048",
    "model.num_heads=16",
    "model.num_kv_heads=16",
    "model.mlp_dim=5504",
)
OLMOE = ("model.num_layers=4", "mesh.expert=1")  # of 16 layers: the state fits beside activations
SMALL = (
    "model.num_layers=2",
    "model.embed_dim=64",
    "model.num_heads=4",
    "model.vocab_size=512",
    "data.length=64",
    "data.batch_size=4",
    "loss.chunk_size=128",
)
SMALL_OF = {
    "llama2.py:7b": ("model.num_kv_heads=4", "model.head_dim=16", "model.mlp_dim=128"),
    "olmoe.py:1b-7b": (
        *("model.num_kv_heads=4", "model.head_dim=16", "model.moe.num_experts=8"),
        *("model.moe.num_experts_per_token=2", "model.moe.mlp_dim=32", "mesh.expert=1"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A config, the rows and the length of its batch, and the goal of its MFU in percent of the
    best matrix product of the same process.
    """

    config: str
    rows: int
    length: int
    mfu: float | None = None
    settings: tuple[str, ...] = ()

    def make_config(self, small: bool = False) -> ConfigTree:
        """The config for one device."""
        settings = [f"data.batch_size={self.rows}", f"data.length={self.length}"]
        settings += ["train.num_microbatches=1", "loader.kind=thread"]
        settings += [f"model.max_length={self.length}", *self.settings]
        settings += [*SMALL, *SMALL_OF.get(self.config, ())] if small else []
        return command_line.read(str(CONFIGS / self.config), settings)


# 65,536 tokens a step at 124M and 32,768 at the others: all fit into three quarters of an H200.
SHAPES = {
    **{f"124m-{n}": Shape("gpt2.py:124m", 65536 // n, n, 45) for n in (1024, 2048, 8192)},
    **{f"350m-{n}": Shape("gpt2.py:350m", 32768 // n, n) for n in (1024, 2048, 8192)},
    **{
        f"1.3b-{n}": Shape("llama2.py:7b", 32768 // n, n, 55, LLAMA_1_3B)
        for n in (1024, 2048, 8192)
    },
    "olmoe": Shape("olmoe.py:1b-7b", 8, 2048, None, OLMOE),
}


def read_plans(path: Path | None) -> dict[str, dict[str, Any]]:
    """{shape: its plan} of a file that `make_plans` wrote; empty without one."""
    return {} if path is None else json.loads(path.read_text())["plans"]


def make_plans(path: Path, topology: str, names: list[str], small: bool) -> None:
    """Compile the steps for an absent GPU and write what their plans say, after each of them."""
    import jax

    from lm.planning import plan as plans
    from lm.storage.files import write_atomically

    found: dict[str, Any] = {"topology": topology, "jax": jax.__version__, "plans": {}}
    if path.exists() and (old := json.loads(path.read_text()))["topology"] == topology:
        found["plans"] = old["plans"]  # of the shapes that are not made again
    for name in names:
        config = SHAPES[name].make_config(small)
        plan = plans.make(config, topology, config_name=name, folder=plans.cache_folder())
        found["plans"][name] = {
            "memory_bytes": plan.memory.total,
            "lower_bound_s": plan.times.lower_bound_s,
            "upper_bound_s": plan.times.upper_bound_s,
            "mfu": plan.mfu_bounds,
            "fits": plan.fits,
            "rows": plan.rows,
            "length": plan.length,
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
        }
        write_atomically(path, json.dumps(found, indent=1) + "\n")
        print(f"{name}: {json.dumps(found['plans'][name])}", flush=True)


def against_plan(
    plan: Mapping[str, Any], step_s: float, peak_bytes: float | None
) -> dict[str, float | None]:
    """Figures of a plan beside what was measured: percent that is beyond the plan's."""
    middle = (plan["lower_bound_s"] + plan["upper_bound_s"]) / 2
    memory = plan["memory_bytes"]
    return {
        "plan_ms": 1e3 * middle,
        "beyond_plan_time_percent": 100 * (step_s / middle - 1) if middle else None,
        "plan_bytes": memory,
        "beyond_plan_memory_percent": 100 * (peak_bytes / memory - 1) if peak_bytes else None,
    }
