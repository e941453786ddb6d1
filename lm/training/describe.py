"""Description of a run before its first step: parameters, their origin, mesh, steps, warnings."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import ml_collections

from lm.optim.param_tree import named_leaves
from lm.parallel.process_group import print_on_lead
from lm.telemetry.progress import format_quantity
from lm.training import bad_step_report
from lm.training.experiment import Experiment
from lm.training.fork import changed_lines


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
