"""Tables of names: which tensors of theirs hold a parameter of ours, and how it lies in them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class TensorLayout(NamedTuple):
    """How one layer's array of ours is written as theirs: its first `inputs` dimensions make up one
    dimension, the others another, and `transposed` puts the latter first. 0 inputs: a vector.
    """

    inputs: int
    transposed: bool = False

    def shape(self, ours: Shape) -> Shape:
        """The shape of theirs."""
        if not self.inputs:
            return (math.prod(ours),)
        sides = math.prod(ours[: self.inputs]), math.prod(ours[self.inputs :])
        return sides[::-1] if self.transposed else sides

    def to_tensor(self, x: np.ndarray) -> np.ndarray:
        if not self.inputs:
            return x.reshape(-1)
        x = x.reshape(math.prod(x.shape[: self.inputs]), -1)
        return x.T if self.transposed else x

    def to_parameter(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        return (x.T if self.transposed else x).reshape(shape)


VECTOR = TensorLayout(0)  # norms; biases, also those of heads [N, H]
TABLE = TensorLayout(1)  # embeddings [V, D]; GPT-2's weights [in, out]
TABLE_OUT = TensorLayout(2)  # GPT-2's weight of the output, ours [N, H, D]
LINEAR = TensorLayout(1, True)  # torch.nn.Linear [out, in]
LINEAR_OUT = TensorLayout(2, True)  # the same of ours [N, H, D]


class WeightMapping(NamedTuple):
    """A parameter of ours, `layers.mlp.up.weight` say, and the tensors of theirs that hold it.

    `{layer}` and `{expert}` in `tensor` are the leading dimensions of ours. Several rows may share
    a tensor: each is the `part`-th of `parts` equal pieces of its last dimension.
    """

    parameter: str
    tensor: str
    layout: TensorLayout
    part: int = 0
    parts: int = 1

    @property
    def num_stacked(self) -> int:
        return ("{layer}" in self.tensor) + ("{expert}" in self.tensor)


@dataclasses.dataclass(frozen=True)
class Place:
    """One layer's (and expert's) array of ours, in a tensor of theirs."""

    row: WeightMapping
    index: Shape  # in the leading dimensions of ours
    shape: Shape  # of ours, without them

    @property
    def name(self) -> str:
        layer, expert = self.index[:1], self.index[1:]
        if "{layer}" not in self.row.tensor:
            layer, expert = (), self.index
        return self.row.tensor.format(layer=(*layer, 0)[0], expert=(*expert, 0)[0])

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """Ours, out of the whole tensor."""
        width = tensor.shape[-1] // self.row.parts
        own = tensor[..., self.row.part * width : (self.row.part + 1) * width]
        return self.row.layout.to_parameter(own, self.shape)


def places(rows: Sequence[WeightMapping], leaves: Mapping[str, Shape]) -> list[Place]:
    """Where all parameters lie, {name: shape} of ours, leaf by leaf.

    Raises:
        ValueError: rows and leaves don't match, one to one; the message lists both sides.
    """
    named = [row.parameter for row in rows]
    extra, missing = sorted(set(named) - set(leaves)), sorted(set(leaves) - set(named))
    if extra or missing or len(set(named)) < len(named):
        raise ValueError(
            "the table of names doesn't fit the model:\n"
            f"  parameters without a row: {', '.join(missing) or 'none'}\n"
            f"  rows without a parameter: {', '.join(extra) or 'none'}"
        )
    found = []
    for row in rows:
        stacked, own = (
            leaves[row.parameter][: row.num_stacked],
            leaves[row.parameter][row.num_stacked :],
        )
        for index in itertools.product(*(range(n) for n in stacked)):
            found.append(Place(row, index, own))
    return found


def tensors(where: Sequence[Place]) -> dict[str, list[Place]]:
    """{name of a tensor of theirs: what it holds, in the order of parts}."""
    found: dict[str, list[Place]] = {}
    for place in where:
        found.setdefault(place.name, []).append(place)
    for name, parts in found.items():
        parts.sort(key=lambda place: place.row.part)
        assert [p.row.part for p in parts] == list(range(parts[0].row.parts)), name
    return found


def tensor_shape(parts: Sequence[Place]) -> Shape:
    """The shape of a tensor that holds `parts`."""
    shapes = [place.row.layout.shape(place.shape) for place in parts]
    return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))


def match(
    wanted: Mapping[str, Shape],
    there: Mapping[str, Shape],
    *,
    aliases: Mapping[str, str],
    buffers: str,
    skip: Sequence[str] = (),
) -> list[str]:
    """The tensors of `there` that nothing is read from: aliases, buffers, and what `skip`, regular
    expressions of whole names, says.

    Raises:
        ValueError: other tensors are there than `wanted`, or of other shapes; lists both sides.
    """
    patterns = [p for p in (buffers, *skip) if p]
    unread = [n for n in there if n in aliases or any(re.fullmatch(p, n) for p in patterns)]
    unread = [n for n in unread if n not in wanted]
    missing = [f"{n} {list(wanted[n])}" for n in sorted(set(wanted) - set(there))]
    extra = [f"{n} {list(there[n])}" for n in sorted(set(there) - set(wanted) - set(unread))]
    shapes = [
        f"{n}: {list(there[n])} in the file, {list(wanted[n])} by config.json"
        for n in sorted(set(wanted) & set(there))
        if wanted[n] != there[n]
    ]
    if missing or extra or shapes:
        sides = {
            "parameters without a tensor": missing,
            "tensors without a parameter (--skip=PATTERN leaves them out)": extra,
            "other shapes": shapes,
        }
        raise ValueError(
            "the tensors are not those of config.json:"
            + "".join(f"\n  {side}: {some(names)}" for side, names in sides.items() if names)
        )
    return unread


def some(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    shown, more = names[:40], len(names) - 40
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
