"""Description of a run before its first step: parameters, their origin, mesh, steps, warnings; and
the part of it that its folder keeps, in overview.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

from lm.checkpoint.code_version import code_version
from lm.optim.param_tree import named_leaves
from lm.parallel.process_group import print_on_lead
from lm.storage.files import write_atomically
from lm.telemetry import jsonl
from lm.telemetry.metrics import OVERVIEW_FILE
from lm.telemetry.progress import format_quantity
from lm.training import bad_step_report, run_costs
from lm.training.experiment import Experiment
from lm.training.fork import changed_lines


def overview(experiment: Experiment) -> dict[str, Any]:
    """Sizes that follow from config, data and devices together, for pages about the run.

    `sources` are those of training: rows, share of all examples, and epochs of the whole run.
    """
    steps, batch_size = experiment.num_steps, experiment.batch_size
    params, initializer = experiment.abstract_params, experiment.initializer
    data, devices = experiment.train_data, experiment.rules.mesh.devices
    counts = data.sampler.rows_before(steps * batch_size).tolist()
    return {
        "num_steps": steps,
        "batch_size": batch_size,
        "length": experiment.config.data.length,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "trained_parameters": sum(x.size for x in jax.tree.leaves(initializer.trained(params))),
        "flops_per_token": experiment.flops_per_token,
        "teacher_flops_per_token": run_costs.teacher_flops_per_token(experiment),
        "devices": f"{devices.size} × {devices.flat[0].device_kind}",
        "processes": jax.process_count(),
        "code": code_version(),
        "sources": [
            {
                "source": name,
                "rows": len(source),
                "share": count / max(sum(counts), 1),
                "epochs": count / len(source),
            }
            for (name, source), count in zip(data.sources.items(), counts, strict=True)
        ],
    }


def write_overview(experiment: Experiment, workdir: str) -> None:
    """Write overview.json, which each start of the run does again: its devices may be others."""
    write_atomically(f"{workdir}/{OVERVIEW_FILE}", jsonl.dumps(overview(experiment), indent=2))


def describe(experiment: Experiment, *, is_new: bool) -> None:
    """Print what is about to run; of a new run also where its parameters come from."""
    for line in _lines(experiment, is_new):
        print_on_lead(line)


def _lines(experiment: Experiment, is_new: bool) -> Iterator[str]:
    c, mesh, initializer = experiment.config, experiment.rules.mesh, experiment.initializer
    if is_new and (parent := initializer.parent) is not None:
        yield f"warm start: parameters of {parent.workdir} at step {parent.step}"
        old = ml_collections.ConfigDict(parent.manifest.config)
        for line in changed_lines(old, experiment.config_dict, ("model", "data.tokenizer")):
            yield f"unlike the parent: {line}"
    if is_new and experiment.fork is not None:
        yield f"forked from {experiment.fork}"
    if is_new and initializer.word_vectors is not None:
        yield initializer.word_vectors.describe()
    if (teacher := experiment.teacher) is not None:
        yield f"{teacher}, {run_costs.teacher_share(experiment):.0%} of the FLOPs"
    if c.log.parameter_table:
        yield from _parameter_table(experiment)
    for source in [*experiment.train_data.sources.values(), *experiment.validation.values()]:
        if source.truncation_summary:
            yield source.truncation_summary
    sizes = [x.size for x in jax.tree.leaves(experiment.abstract_params)]
    trained = [x.size for x in jax.tree.leaves(initializer.trained(experiment.abstract_params))]
    part = f" ({format_quantity(sum(trained))} trained)" if initializer.frozen else ""
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    tokens = experiment.batch_size * c.data.length
    yield (
        f"{format_quantity(sum(sizes))} parameters{part} · "
        f"{mesh.size} × {mesh.devices.flat[0].device_kind}{' · ' + axes if axes else ''} · "
        f"{experiment.num_steps} steps of {format_quantity(tokens)} tokens "
        f"({format_quantity(experiment.num_steps * tokens)} in all)"
    )
    if experiment.compiler_options:
        pairs = (f"{name}={value}" for name, value in experiment.compiler_options.items())
        yield f"compiler flags (config.train.compiler_flags): {' '.join(pairs)}"
    early = [step for step in c.checkpoint.at if step < experiment.num_steps]
    if not (c.checkpoint.every or c.checkpoint.every_seconds or early):
        yield (
            "no checkpoint before the end (config.checkpoint.every=0, every_seconds=0): a run that "
            "is killed starts again"
        )
    if c.guard.policy == "rewind" and not bad_step_report.is_repeatable(experiment):
        yield (
            "config.guard.policy=rewind: this GPU doesn't repeat bits, so a verdict will only say "
            "whether a bad step is bad again; set "
            "--config.train.compiler_flags=\"('auto','xla_gpu_deterministic_ops=true')\" for causes"
        )


def _parameter_table(experiment: Experiment) -> Iterator[str]:
    """Lines of name, shape and partition spec of every parameter."""
    is_sharded = experiment.rules.mesh.size > 1
    rows = []
    for name, leaf in named_leaves(experiment.abstract_params).items():
        spec = str(leaf.sharding.spec).removeprefix("PartitionSpec") if is_sharded else ""
        mark = "  frozen" if name in experiment.initializer.frozen else ""
        rows.append((name, str(leaf.shape), spec + mark))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for name, shape, rest in rows:
        yield f"  {name:<{widths[0]}}  {shape:<{widths[1]}}  {rest}".rstrip()
