"""The synthetic task of SeqGAN (arXiv:1609.05473, section 4.1): sequences of an LSTM whose
parameters are all drawn from N(0, 1), under which the sequences of another model can be scored.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lm.data.packing import check_rows
from lm.data.rows import RowLayout, Rows, Span

WIDTH = 32  # of embeddings and of the state, as in the paper
CHUNK = 64  # rows that are drawn together


class Parameters(NamedTuple):
    """The oracle's weights; gates in the order input, forget, candidate, output."""

    embedding: np.ndarray  # [V, D]
    weight: np.ndarray  # [D, 4, F]
    recurrent: np.ndarray  # [F, 4, F]
    bias: np.ndarray  # [4, F]
    head: np.ndarray  # [F, V]
    head_bias: np.ndarray  # [V]


@functools.lru_cache(maxsize=4)
def parameters(vocab_size: int) -> Parameters:
    """Return the oracle of a vocabulary, always the same one: float64, the seed is `vocab_size`."""
    rng = np.random.default_rng(vocab_size)
    shapes = (
        (vocab_size, WIDTH),
        (WIDTH, 4, WIDTH),
        (WIDTH, 4, WIDTH),
        (4, WIDTH),
        (WIDTH, vocab_size),
        (vocab_size,),
    )
    return Parameters(*(rng.standard_normal(shape) for shape in shapes))


def step(
    oracle: Parameters, token: np.ndarray, hidden: np.ndarray, memory: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (hidden [B, F], memory [B, F], logits [B, V]) after token: int [B]."""
    gates = np.tensordot(oracle.embedding[token], oracle.weight, 1)
    gates = gates + np.tensordot(hidden, oracle.recurrent, 1) + oracle.bias
    write, keep, read = (1 / (1 + np.exp(-gates[:, i])) for i in (0, 1, 3))
    memory = keep * memory + write * np.tanh(gates[:, 2])
    hidden = read * np.tanh(memory)
    return hidden, memory, hidden @ oracle.head + oracle.head_bias


@functools.lru_cache(maxsize=4096)
def sample(vocab_size: int, start: int, length: int, seed: int, chunk: int) -> np.ndarray:
    """Return sequences of the oracle that follow the id `start`, int32 [CHUNK, length]: a function
    of its arguments, whatever rows of it are read.
    """
    draws = np.random.default_rng([vocab_size, seed, chunk]).random((length, CHUNK, 1))
    oracle, token = parameters(vocab_size), np.full(CHUNK, start)
    hidden = memory = np.zeros((CHUNK, WIDTH))
    ids = np.zeros((CHUNK, length), np.int32)
    for i in range(length):
        hidden, memory, logits = step(oracle, token, hidden, memory)
        chances = np.cumsum(np.exp(logits - logits.max(axis=1, keepdims=True)), axis=1)
        token = (chances[:, :-1] < draws[i] * chances[:, -1:]).sum(axis=1)
        ids[:, i] = token
    return ids


@dataclass(frozen=True)
class OracleRows:
    """`num_rows` sequences of the oracle, one a row, without eos; a `RowSource`."""

    layout: RowLayout
    vocab_size: int
    start: int
    num_rows: int = 10_000
    seed: int = 0
    bytes_per_token = None  # no text behind the tokens
    truncation_summary = ""

    def __len__(self) -> int:
        return self.num_rows

    def read(self, rows: np.ndarray) -> Rows:
        """Return the rows with the indices `rows`: int64 [B]; IndexError outside of `[0, len)`."""
        rows = check_rows(rows, self.num_rows, "synthetic:oracle")
        ids = np.zeros((len(rows), self.layout.length), np.int32)
        chunks, places = np.divmod(rows, CHUNK)
        for chunk in np.unique(chunks):
            drawn = sample(self.vocab_size, self.start, self.layout.length, self.seed, int(chunk))
            ids[chunks == chunk] = drawn[places[chunks == chunk]]
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        return Rows(ids, np.ones_like(ids), positions, np.full_like(ids, -1))

    def documents(self, rows: np.ndarray) -> list[list[Span]]:
        """Return the sequence of each row."""
        return [[Span(int(row), f"oracle/{row}", 0, self.layout.length)] for row in rows]
