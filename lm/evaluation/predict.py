"""Predictions of a run for the records of a task: generated texts, or labels by likelihood."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.sources import RowLayout, Rows
from lm.generation.beam import BeamSearch
from lm.generation.buckets import power_of_two
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


class Predictor:
    """Predicts targets from sources, as the run's objective is trained to."""

    def __init__(self, experiment: Experiment, params: Params, task: str | None = None) -> None:
        """task: one of those of a multitask objective.

        Raises:
            ValueError: an objective that predicts no target from a source.
        """
        self._experiment, self._params = experiment, params
        self._tokenizer = experiment.tokenizer
        self.config = _objective(experiment, task)
        if self._is_decoder and getattr(self.config, "bidirectional", False):
            raise ValueError(
                "config.objective.bidirectional: a decoder that sees the whole source cannot "
                "generate token by token yet"
            )

    @property
    def is_classifier(self) -> bool:
        return isinstance(self.config, classification.Config)

    @property
    def _is_decoder(self) -> bool:
        form = self._experiment.model_interface
        return form.is_causal and form.encoder_length is None

    def predict(
        self,
        sources: Sequence[str],
        *,
        max_new_tokens: int = 64,
        search: Sampling | BeamSearch = GREEDY,
        batch_size: int = 32,
        report: Report = lambda done, count: None,
    ) -> list[Prediction]:
        """The prediction for each source, in their order. Sources too long for the rows of
        training are cut at their end, as data.too_long=cut does.

        max_new_tokens, search, batch_size: of texts. Labels need none of them.
        """
        if isinstance(self.config, classification.Config):
            return self._classify(self.config, sources, report)
        return self._generate(sources, max_new_tokens, search, batch_size, report)

    def _generate(
        self,
        sources: Sequence[str],
        max_new_tokens: int,
        search: Sampling | BeamSearch,
        batch_size: int,
        report: Report,
    ) -> list[Prediction]:
        form = self._experiment.model_interface
        room = form.length - max_new_tokens if self._is_decoder else (form.encoder_length or 0)
        if room < 2:
            raise ValueError(
                f"max_new_tokens ({max_new_tokens}) leaves no room for a source in rows of "
                f"config.data.length ({form.length})"
            )
        encoded = [self._tokenizer.encode(source) for source in sources]
        prompts = [ids[: room - 1] for ids in encoded]
        cut = [len(ids) > room - 1 for ids in encoded]
        if self._is_decoder:  # else the eos of the source is the generator's
            prompts = [np.append(ids, self._tokenizer.eos_id) for ids in prompts]
        generator = Generator(self._experiment.model, self._params, self._tokenizer)
        texts = [""] * len(sources)
        done = 0
        for members in _by_length(prompts, batch_size):
            made = generator.generate(
                [prompts[i] for i in members], max_new_tokens=max_new_tokens, sampling=search
            )
            for generation in made:
                if generation.sample == 0:
                    texts[members[generation.prompt]] = generation.text.strip()
            done += len(members)
            report(done, len(sources))
        return [Prediction(text, None, c) for text, c in zip(texts, cut, strict=True)]

    def _classify(
        self, config: classification.Config, sources: Sequence[str], report: Report
    ) -> list[Prediction]:
        experiment = self._experiment
        verbalizers = classification.label_tokens(config, self._tokenizer)
        eos = self._tokenizer.eos_id
        label = np.append(
            self._tokenizer.encode(config.labels[0]), eos
        )  # any label: its value is not read
        form = experiment.model_interface
        room = (form.encoder_length or form.length - len(label)) - 1
        encoded = [self._tokenizer.encode(source) for source in sources]
        texts = [np.append(ids[:room], eos) for ids in encoded]
        found: list[Prediction | None] = [None] * len(sources)
        done = 0
        for members in _by_length(texts, experiment.batch_size):
            width = power_of_two(max(len(texts[i]) for i in members) + len(label))
            if form.encoder_length is None:
                narrow = dataclasses.replace(form, length=min(width, form.length))
            else:
                narrow = dataclasses.replace(form, encoder_length=min(width, form.encoder_length))
            objective = classification.build(config, self._tokenizer, narrow)
            rows = _rows([(texts[i], label) for i in members], objective.layout)
            batch = objective(_padded(rows, experiment.batch_size), np.random.default_rng)
            probabilities = _label_probabilities(
                experiment.model, self._params, experiment.make_global_batch(batch), verbalizers
            )
            for i, row in zip(members, np.asarray(probabilities), strict=False):
                best = int(row.argmax())
                found[i] = Prediction(config.labels[best], float(row[best]), len(encoded[i]) > room)
            done += len(members)
            report(done, len(sources))
        return [prediction for prediction in found if prediction is not None]


@functools.partial(jax.jit, static_argnames="model")
def _label_probabilities(model: Model, params: Params, batch: Batch, verbalizers: Array) -> Array:
    """float32 [B, labels], at the one position that a row scores."""
    variables = {"params": params}
    hidden = model.apply(variables, batch.inputs, encoder=batch.encoder).hidden
    at = jnp.argmax(batch.weights, axis=1)
    hidden = jnp.take_along_axis(hidden, at[:, None, None], axis=1)  # [B, 1, D]
    logits = model.apply(variables, hidden, method="logits")[:, 0]
    return jax.nn.softmax(logits[:, verbalizers].astype(jnp.float32), axis=1)


def _objective(experiment: Experiment, task: str | None) -> classification.Config | seq2seq.Config:
    """The config of the objective, or of one of its tasks."""
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
    return config


def _by_length(texts: Sequence[np.ndarray], size: int) -> Iterator[list[int]]:
    """Indices of texts, those of similar length together, `size` at a time."""
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _rows(pairs: Sequence[tuple[np.ndarray, np.ndarray]], layout: RowLayout) -> Rows:
    """One document of two fields in each row, as a store of pairs would have it."""
    shape = (len(pairs), layout.length)
    ids, segments, positions, fields = (np.zeros(shape, np.int32) for _ in range(4))
    for row, pair in enumerate(pairs):
        start = 0
        for field, part in enumerate(pair):
            own_rows = len(layout.lengths) > 1  # of the encoder and of the decoder
            begin = sum(layout.lengths[:field]) if own_rows else start
            at = slice(begin, begin + len(part))
            ids[row, at], segments[row, at], fields[row, at] = part, 1, field
            positions[row, at] = np.arange(len(part)) + (0 if own_rows else start)
            start += len(part)
    return Rows(ids, segments, positions, np.full_like(ids, -1), fields)


def _padded(rows: Rows, count: int) -> Rows:
    """The rows, and rows of padding up to `count`."""

    arrays = {f.name: getattr(rows, f.name) for f in dataclasses.fields(rows)}
    padded = {
        name: np.concatenate([x, np.zeros((count - len(x), *x.shape[1:]), x.dtype)])
        for name, x in arrays.items()
        if x is not None
    }
    return Rows(**padded)
