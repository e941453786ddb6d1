"""Verifies every parallelism on the processes that scripts/launch/local.py starts it in."""

import os
import sys

from lm import cli
from lm.parallel import process_group

PIPELINE = "model.pipeline.num_microbatches"
SEQUENCE = "model.sequence_parallel"
# (config, mesh, changes)
COMBINATIONS = (
    ("llama3", {"fsdp": 8}, {}),
    ("llama3", {"data": 2, "fsdp": 4}, {}),
    ("llama3", {"fsdp": 2, "tensor": 4}, {}),
    ("llama3", {"sequence": 4, "fsdp": 2}, {SEQUENCE: "ring"}),
    ("llama3", {"sequence": 4, "fsdp": 2}, {SEQUENCE: "gather"}),
    ("llama3", {"stage": 4, "fsdp": 2}, {PIPELINE: 4}),
    ("llama3", {"stage": 2, "tensor": 2, "fsdp": 2}, {PIPELINE: 2}),
    ("llama3", {"data": 4, "fsdp": 2, "slices": 2}, {}),
    ("mixtral", {"expert": 4, "fsdp": 2}, {}),
)


def main():
    os.environ.setdefault("NPROC", "64")
    parser = cli.ArgumentParser()
    process_group.add_flags(parser)
    process_group.initialize_from(parser.parse_args())
    import jax

    from configs import llama3, mixtral
    from lm.planning import mesh_equivalence

    given = {"llama3": llama3.get_config("8b"), "mixtral": mixtral.get_config()}
    small = {name: mesh_equivalence.shrink(config) for name, config in given.items()}
    alone = {}  # by what dropout and the order of rows depend on
    wrong = 0
    for name, mesh, changes in COMBINATIONS:
        config = small[name].copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        key = (name, changes.get(PIPELINE))
        if key not in alone:
            alone[key] = mesh_equivalence.on_one_device(config, jax.devices())
        report = mesh_equivalence.compare(
            mesh_equivalence.on_mesh(config, mesh, jax.devices()), alone[key]
        )
        wrong += not report.ok
        if jax.process_index() == 0:
            worst = max(report.differences, key=lambda d: d.value)
            print(name, mesh, f"{worst.value:.1e} {worst.what} {worst.worst}", flush=True)
            print("" if report.ok else mesh_equivalence.describe(report), flush=True)
    sys.exit(process_group.leave(min(wrong, 1)))


if __name__ == "__main__":
    main()
