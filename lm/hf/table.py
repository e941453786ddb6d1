"""Tables of names: the tensor of a checkpoint that holds a parameter, and its layout there."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jax import Array

Shape = tuple[int, ...]


class TensorLayout(NamedTuple):
    """One layer's parameter as a matrix: its first `inputs` dimensions are flattened to one
    dimension, the others to another, which `transposed` puts first. 0 inputs: a vector.
    """

    inputs: int
    transposed: bool = False

    def shape(self, parameter: Shape) -> Shape:
        """The tensor's shape for a parameter's."""
        if not self.inputs:
            return (math.prod(parameter),)
        sides = math.prod(parameter[: self.inputs]), math.prod(parameter[self.inputs :])
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
TABLE_OUT = TensorLayout(2)  # GPT-2's weight of the attention's output; the parameter is [N, H, D]
LINEAR = TensorLayout(1, True)  # torch.nn.Linear [out, in]
LINEAR_OUT = TensorLayout(2, True)  # the same of the attention's output


class WeightMapping(NamedTuple):
    """A parameter, `layers.mlp.up.weight` say, and the tensors that hold it.

    `{layer}` and `{expert}` in `tensor` are the parameter's leading dimensions. Several parameters
    may share a tensor: each is the `part`-th of `parts` equal parts of its last dimension.
    """

    parameter: str
    tensor: str
    layout: TensorLayout
    part: int = 0
    parts: int = 1

    @property
    def num_stacked(self) -> int:
        return ("{layer}" in self.tensor) + ("{expert}" in self.tensor)


def linear(
    name: str, tensor: str, layout: TensorLayout = LINEAR, *, bias: bool = True
) -> list[WeightMapping]:
    """The weight, and the bias, of a linear layer."""
    weight = WeightMapping(f"{name}.weight", f"{tensor}.weight", layout)
    return [weight, *([WeightMapping(f"{name}.bias", f"{tensor}.bias", VECTOR)] if bias else [])]


def norm(name: str, tensor: str, *, bias: bool = True) -> list[WeightMapping]:
    """The scale, and the bias, of a norm."""
    scale = WeightMapping(f"{name}.scale", f"{tensor}.weight", VECTOR)
    return [scale, *([WeightMapping(f"{name}.bias", f"{tensor}.bias", VECTOR)] if bias else [])]


@dataclasses.dataclass(frozen=True)
class ParameterSlice:
    """One layer's (and expert's) array of a parameter, which lies in one tensor."""

    mapping: WeightMapping
    index: Shape  # in the leading dimensions of the parameter
    shape: Shape  # without them

    @property
    def tensor(self) -> str:
        """The tensor's name."""
        names = [name for name in ("layer", "expert") if f"{{{name}}}" in self.mapping.tensor]
        return self.mapping.tensor.format(**dict(zip(names, self.index, strict=True)))

    def to_tensor(self, parameter: Array) -> np.ndarray:
        """Its part of the tensor, from the whole parameter."""
        return self.mapping.layout.to_tensor(np.asarray(parameter[self.index]))

    def from_tensor(self, tensor: np.ndarray) -> np.ndarray:
        """The array, from the whole tensor."""
        width = tensor.shape[-1] // self.mapping.parts
        own = tensor[..., self.mapping.part * width : (self.mapping.part + 1) * width]
        return self.mapping.layout.to_parameter(own, self.shape)


def parameter_slices(
    mappings: Sequence[WeightMapping], parameters: Mapping[str, Shape]
) -> list[ParameterSlice]:
    """The slices of all parameters, {name: shape}, one parameter after the other.

    Raises:
        ValueError: mappings and parameters don't match, one to one; the message lists both sides.
    """
    named = [mapping.parameter for mapping in mappings]
    extra, missing = sorted(set(named) - set(parameters)), sorted(set(parameters) - set(named))
    if extra or missing or len(set(named)) < len(named):
        raise ValueError(
            "the table of names doesn't fit the model:\n"
            f"  parameters without a row: {', '.join(missing) or 'none'}\n"
            f"  rows without a parameter: {', '.join(extra) or 'none'}"
        )
    found = []
    for mapping in mappings:
        shape, n = parameters[mapping.parameter], mapping.num_stacked
        for index in itertools.product(*map(range, shape[:n])):
            found.append(ParameterSlice(mapping, index, shape[n:]))
    return found


def by_tensor(slices: Sequence[ParameterSlice]) -> dict[str, list[ParameterSlice]]:
    """{name of a tensor: the slices that it holds, in the order of its parts}."""
    found: dict[str, list[ParameterSlice]] = {}
    for one in slices:
        found.setdefault(one.tensor, []).append(one)
    for name, parts in found.items():
        parts.sort(key=lambda one: one.mapping.part)
        assert [one.mapping.part for one in parts] == list(range(parts[0].mapping.parts)), name
    return found


def tensor_shape(parts: Sequence[ParameterSlice]) -> Shape:
    """The shape of the tensor that holds `parts`."""
    shapes = [one.mapping.layout.shape(one.shape) for one in parts]
    return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))


def check_tensors(
    found: Mapping[str, Shape],
    wanted: Mapping[str, Shape],
    *,
    aliases: Mapping[str, str],
    buffers: str,
    skip: Sequence[str] = (),
) -> list[str]:
    """Compare the tensors of a checkpoint with those that the model needs, {name: shape} both.

    Returns the tensors that hold no parameter: aliases, buffers, and the names that match one of
    the regular expressions `skip`.

    Raises:
        ValueError: a tensor is missing, extra, or of another shape; lists both sides.
    """
    patterns = [p for p in (buffers, *skip) if p]
    unread = [
        n
        for n in found
        if n not in wanted and (n in aliases or any(re.fullmatch(p, n) for p in patterns))
    ]
    problems = {
        "parameters without a tensor": [
            f"{n} {list(wanted[n])}" for n in sorted(set(wanted) - set(found))
        ],
        "tensors without a parameter (--skip=PATTERN leaves them out)": [
            f"{n} {list(found[n])}" for n in sorted(set(found) - set(wanted) - set(unread))
        ],
        "other shapes": [
            f"{n}: {list(found[n])} in the file, {list(wanted[n])} by config.json"
            for n in sorted(set(wanted) & set(found))
            if wanted[n] != found[n]
        ],
    }
    if any(problems.values()):
        raise ValueError(
            "the tensors are not those of config.json:"
            + "".join(f"\n  {kind}: {shortened(n)}" for kind, n in problems.items() if n)
        )
    return unread


def shortened(names: Sequence[str], limit: int = 40) -> str:
    """The first names of a list, and the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
