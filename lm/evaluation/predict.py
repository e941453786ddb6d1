"""Predictions of a run for the records of a task: generated texts, or labels by likelihood."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.rows import RowLayout, Rows
from lm.generation.beam import BeamSearch
from lm.generation.buckets import Prompt, power_of_two
from lm.generation.generator import Generator
from lm.generation.sampling import Sampling
from lm.generation.score import Report
from lm.objectives import classification, seq2seq
from lm.training.experiment import Experiment
from lm.types import Array, Batch, Model, Params

GREEDY = Sampling(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Prediction for one source: a generated text, or a label."""

    text: str
    probability: float | None  # of the label, among all labels
    is_cut: bool  # the model saw only the beginning of the source, which is longer than its rows


def predict(
    experiment: Experiment,
    params: Params,
    sources: Sequence[str],
    *,
    task: str | None = None,
    max_new_tokens: int = 64,
    search: Sampling | BeamSearch = GREEDY,
    batch_size: int = 32,
    report: Report = lambda done, count: None,
) -> list[Prediction]:
    """The prediction for each source, in their order. Sources too long for the rows of training are
    cut at their end, as data.too_long=cut does.

    max_new_tokens, search, batch_size: of texts. Labels need none of them.

    Raises:
        ValueError: as `task_config`, or no room is left for a source.
    """
    config = task_config(experiment, task)
    if isinstance(config, classification.Config):
        return _classify(experiment, params, config, sources, report)
    form, tokenizer = experiment.model_interface, experiment.tokenizer
    is_decoder = form.encoder_length is None
    room = room_for_source(experiment, max_new_tokens)
    encoded = [tokenizer.encode(source) for source in sources]
    prompts = [ids[:room] for ids in encoded]
    if is_decoder:  # else the eos of the source is the generator's
        prompts = [np.append(ids, tokenizer.eos_id) for ids in prompts]
    generator = Generator(experiment.model, params, tokenizer)
    texts: dict[int, str] = {}
    for found in continuations(generator, prompts, batch_size, max_new_tokens, search):
        texts |= found
        report(len(texts), len(sources))
    return [Prediction(texts[i].strip(), None, len(x) > room) for i, x in enumerate(encoded)]


def room_for_source(experiment: Experiment, max_new_tokens: int) -> int:
    """The tokens of a source, without its eos, before a text. Raises ValueError where none fits."""
    form = experiment.model_interface
    room = (form.encoder_length or form.length - max_new_tokens) - 1
    if room < 1:
        raise ValueError(
            f"max_new_tokens ({max_new_tokens}) leaves no room for a source in rows of "
            f"config.data.length ({form.length})"
        )
    return room


def _classify(
    experiment: Experiment,
    params: Params,
    config: classification.Config,
    sources: Sequence[str],
    report: Report,
) -> list[Prediction]:
    form, tokenizer = experiment.model_interface, experiment.tokenizer
    verbalizers = classification.label_tokens(config, tokenizer)
    label = tokenizer.encode(config.labels[0])  # any one: its value is not read
    label = np.append(label, tokenizer.eos_id)
    room = (form.encoder_length or form.length - len(label)) - 1
    encoded = [tokenizer.encode(source) for source in sources]
    texts = [np.append(ids[:room], tokenizer.eos_id) for ids in encoded]
    found: dict[int, Prediction] = {}
    for members in _by_length(texts, experiment.batch_size):
        width = power_of_two(max(len(texts[i]) for i in members) + len(label))
        field = "length" if form.encoder_length is None else "encoder_length"
        narrow = dataclasses.replace(form, **{field: min(width, getattr(form, field))})
        objective = classification.build(config, tokenizer, narrow)
        pairs = [(texts[i], label) for i in members]
        rows = _rows(pairs, objective.layout, experiment.batch_size)
        batch = experiment.make_global_batch(objective(rows, np.random.default_rng))
        probabilities = _label_probabilities(experiment.model, params, batch, verbalizers)
        for i, row in zip(members, np.asarray(probabilities), strict=False):
            best = int(row.argmax())
            found[i] = Prediction(config.labels[best], float(row[best]), len(encoded[i]) > room)
        report(len(found), len(sources))
    return [found[i] for i in range(len(sources))]


@functools.partial(jax.jit, static_argnames="model")
def _label_probabilities(model: Model, params: Params, batch: Batch, verbalizers: Array) -> Array:
    """float32 [B, labels], at the one position that a row scores."""
    variables = {"params": params}
    hidden = model.apply(variables, batch.inputs, encoder=batch.encoder).hidden
    at = jnp.argmax(batch.weights, axis=1)
    hidden = jnp.take_along_axis(hidden, at[:, None, None], axis=1)  # [B, 1, D]
    logits = model.apply(variables, hidden, method="logits")[:, 0]
    return jax.nn.softmax(logits[:, verbalizers].astype(jnp.float32), axis=1)


def task_config(
    experiment: Experiment, task: str | None = None
) -> classification.Config | seq2seq.Config:
    """The config of the run's objective, or of a task of a multitask one; ValueError where that
    predicts no target from a source.
    """
    config = experiment.config.objective
    tasks = getattr(config, "tasks", {})
    if tasks or task is not None:
        if task not in tasks:
            raise ValueError(
                f"task {task!r} must be one of config.objective.tasks: {', '.join(tasks) or 'none'}"
            )
        config = tasks[task].config
    if not isinstance(config, classification.Config | seq2seq.Config):
        raise ValueError(
            "config.objective must be seq2seq or classification, or multitask with such a task, to "
            f"predict a target; it is {type(config).__module__}"
        )
    if isinstance(config, seq2seq.Config) and config.bidirectional:
        raise ValueError(
            "config.objective.bidirectional: a decoder that sees the whole source cannot "
            "generate token by token yet"
        )
    return config


def continuations(
    generator: Generator,
    prompts: Sequence[Prompt],
    batch_size: int,
    max_new_tokens: int,
    sampling: Sampling | BeamSearch,
) -> Iterator[dict[int, str]]:
    """{index of a prompt: its first continuation} of batches of prompts of similar length."""
    for members in _by_length(prompts, batch_size):
        made = generator.generate(
            [prompts[i] for i in members], max_new_tokens=max_new_tokens, sampling=sampling
        )
        yield {members[found.prompt]: found.text for found in made if found.sample == 0}


def _by_length(texts: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    """Indices of texts, those of similar length together, `size` at a time."""
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _rows(pairs: Sequence[tuple[np.ndarray, np.ndarray]], layout: RowLayout, num_rows: int) -> Rows:
    """Rows of one document of two fields, as a store of pairs would have them, then of padding."""
    ids, segments, positions, fields = np.zeros((4, num_rows, layout.length), np.int32)
    own_rows = len(layout.lengths) > 1  # of the encoder and of the decoder
    for row, (source, target) in enumerate(pairs):
        begin, first = (layout.lengths[0], 0) if own_rows else (len(source), len(source))
        at = np.r_[: len(source), begin : begin + len(target)]
        ids[row, at], segments[row, at] = np.concatenate([source, target]), 1
        positions[row, at] = np.r_[: len(source), first : first + len(target)]
        fields[row, begin : begin + len(target)] = 1
    return Rows(ids, segments, positions, np.full_like(ids, -1), fields)
