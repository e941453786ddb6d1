"""Exact, token-weighted evaluation: loss, perplexity and bits per byte of every validation source.

Each row of a source is read exactly once and sums are added up before the one division, so the
metrics don't depend on batch size or mesh (beyond float32 rounding).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm.data import loaders
from lm.data.pipeline import RowSource, Transform, evaluation_batch_at, num_evaluation_batches
from lm.parallel import sharding
from lm.telemetry import metrics
from lm.training.experiment import Experiment
from lm.types import Batch, Params


def evaluate(
    experiment: Experiment,
    params: Params,
    *,
    max_batches: int = 0,
    report: Callable[[str], object] = lambda text: None,
) -> dict[str, dict[str, float]]:
    """{source: {loss, accuracy, perplexity, bits_per_byte, tokens}}, or the figures that an
    objective makes of sums and of embeddings of all rows; losses in nats per token.

    max_batches: limit for every source, 0: all of it; bits per byte then uses the source's mean
    bytes per token. report: called with a progress line after every batch. Threads prepare the next
    `loader.prefetch` batches meanwhile, as in training.
    """
    results: dict[str, dict[str, float]] = {}
    names = metrics.short_names([*experiment.validation])
    loader = dataclasses.replace(experiment.config.loader, kind="thread")
    for name, source in experiment.validation.items():
        objective = experiment.objective.for_source(name).for_evaluation()
        batch_size = experiment.batch_size
        total: dict[str, Any] = {}  # float64, arrays of an objective's own among them
        rows: list[tuple[np.ndarray, ...]] = []  # embeddings and targets, where rows are compared
        # a batch behind: the devices don't wait for the host
        pending: tuple[Mapping[str, jax.Array], tuple[jax.Array, ...]] = {}, ()
        count = num_evaluation_batches(source, batch_size)
        count = min(count, max_batches) if max_batches else count
        if not count:
            raise ValueError(f"config.data.validation: {name} has no rows")
        make = functools.partial(_global_batch, experiment, source, objective)
        with contextlib.closing(loaders.run(make, 0, count, loader)) as batches:
            for i, batch in batches:
                if objective.pairs is None:
                    found = experiment.eval_step(params, batch), ()
                else:
                    found = experiment.embed_step(params, batch)
                _add(total, pending[0])
                _keep(rows, pending[1])
                pending = found
                report(f"evaluating {names[name]} · batch {i + 1}/{count}")
        _add(total, pending[0])
        _keep(rows, pending[1])
        if objective.summarize is not None:
            results[name] = objective.summarize(total)
            if objective.pairs is not None:
                embeddings, targets = map(np.concatenate, zip(*rows, strict=True))
                prompts = embed_texts(experiment, params, objective.pairs.prompts)
                results[name] |= objective.pairs.compare(embeddings, targets, prompts)
            continue
        values = metrics.means(total)
        del values["objective"]
        values["perplexity"] = math.exp(min(values["loss"], 700.0))
        bytes_per_token = source.bytes_per_token
        if objective.scores_every_token and bytes_per_token is not None:
            values["bits_per_byte"] = values["loss"] / math.log(2) / bytes_per_token
        results[name] = values
    return results


def _global_batch(
    experiment: Experiment, source: RowSource, objective: Transform, number: int
) -> Batch:
    batch = evaluation_batch_at(
        source, objective, number, batch_size=experiment.batch_size, rows=experiment.rows
    )
    return experiment.make_global_batch(batch)


def _add(total: dict[str, Any], sums: Mapping[str, jax.Array]) -> None:
    """Add in float64: a float32 sum over millions of tokens would lose some."""
    for name, value in jax.device_get(sums).items():
        total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)


def _keep(rows: list[tuple[np.ndarray, ...]], arrays: tuple[jax.Array, ...]) -> None:
    """Append the embeddings and targets of a batch, without those of padding."""
    if arrays:
        embeddings, targets, weights = jax.device_get(arrays)
        is_row = weights[:, 0] > 0
        rows.append((embeddings[is_row], targets[is_row]))


def embed_texts(experiment: Experiment, params: Params, texts: Sequence[str]) -> np.ndarray:
    """The embeddings of texts, float32 [n, E]: of none, [0, 0].

    Raises:
        ValueError: a text is too long.
    """
    pairs = experiment.objective.pairs
    assert pairs is not None, "of an objective with a tower of texts"
    return _embed(experiment, params, pairs.encode(texts), "embed_texts")


def embed_images(experiment: Experiment, params: Params, images: np.ndarray) -> np.ndarray:
    """The embeddings of images, uint8 [n, height, width, 3]: float32 [n, E], of none, [0, 0]."""
    return _embed(experiment, params, images, "embed_images")


def _embed(experiment: Experiment, params: Params, rows: Any, method: str) -> np.ndarray:
    """Embeddings by a method of the model, in batches no larger than those of training."""
    rules, count = experiment.rules, len(jax.tree.leaves(rows)[0])
    shards = rules.size("batch")
    size = min(experiment.batch_size, -(-count // shards) * shards)
    found = []
    for start in range(0, count, max(size, 1)):
        index = np.minimum(start + sharding.local_rows(rules, size), count - 1)
        part: Any = jax.tree.map(lambda x, index=index: x[index], rows)
        batch = sharding.make_global_batch(rules, part, size)
        found.append(np.asarray(_embed_batch(experiment.model, params, batch, method)))
    return np.concatenate(found)[:count] if found else np.zeros((0, 0), np.float32)


@functools.partial(jax.jit, static_argnames=("model", "method"))
def _embed_batch(model: Any, params: Params, rows: Any, method: str) -> jax.Array:
    return model.rules.constrain(model.apply({"params": params}, rows, method=method), None, None)
