"""The tensors of a checkpoint that hold the parameters of a model, and their layout there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jax import Array

Shape = tuple[int, ...]
TABLES = ("embedding", "position", "type", "relative")  # modules whose weights are never transposed
# parameters, also biases of heads [N, H]
VECTORS = ("scale", "bias", "logit_bias", "logit_scale", "class_token", "query")


@dataclasses.dataclass(frozen=True)
class ParameterSlice:
    """One layer's (and expert's) array of a parameter, and the tensor that holds it.

    Several parameters may share a tensor: each is the `part`-th of `parts` equal parts of the
    dimension of outputs, its last as [in, out].
    """

    parameter: str
    index: Shape  # in the leading dimensions of the parameter
    shape: Shape  # without them
    tensor: str
    part: int
    parts: int
    matrix: Shape  # its shape as a vector, as [in, out], or of patches as [x, y, channels, out]
    transposed: bool  # the tensor has the dimensions in the other order
    ones: int = 0  # dimensions of size 1 that the tensor has before them

    def to_tensor(self, parameter: Array) -> np.ndarray:
        """Its part of the tensor, from the whole parameter."""
        x = np.asarray(parameter[self.index]).reshape(self.matrix)
        return (x.T if self.transposed else x)[(None,) * self.ones]

    def from_tensor(self, tensor: np.ndarray) -> np.ndarray:
        """The array, from the whole tensor."""
        own = tensor.reshape(tensor.shape[self.ones :])
        if self.parts > 1:
            own = np.split(own, self.parts, axis=self.shared_axis)[self.part]
        return (own.T if self.transposed else own).reshape(self.shape)

    @property
    def shared_axis(self) -> int:
        """The dimension of a tensor that parameters share."""
        return 0 if self.transposed else -1


def weight_map(modules: Mapping[str, str], parameters: Mapping[str, Shape]) -> dict[str, str]:
    """{parameter: tensor} of a model's parameters, in the order of the table `modules`.

    A row of the table names a parameter and its tensor, or a module and the checkpoint's: then the
    module's weight or scale is the `weight` there, its bias the `bias`. `{}` in names of tensors
    stands for the layer, a second one for the expert: the leading dimensions of the parameter.

    Raises:
        ValueError: a parameter has no row.
    """
    found = {}
    for name, tensor in modules.items():
        found |= {
            name: tensor,
            f"{name}.weight": f"{tensor}.weight",
            f"{name}.scale": f"{tensor}.weight",
            f"{name}.bias": f"{tensor}.bias",
        }
    if missing := sorted(set(parameters) - set(found)):
        raise ValueError(
            "the table of names doesn't fit the model:\n"
            f"  parameters without a row: {', '.join(missing)}"
        )
    return {name: tensor for name, tensor in found.items() if name in parameters}


def parameter_slices(
    modules: Mapping[str, str],
    parameters: Mapping[str, Shape],
    *,
    transposed: bool = True,
    ones: Mapping[str, int] | None = None,
) -> list[ParameterSlice]:
    """The slices of all parameters, {name: shape}, one parameter after the other.

    modules: as of `weight_map`, whose errors it raises. transposed: weights of layers are [out, in]
    as in torch.nn.Linear, not [in, out] as in GPT-2. ones: {tensor: its first dimensions of size 1
    that the parameter lacks}.
    """
    found, names = [], weight_map(modules, parameters)
    for name, tensor in names.items():
        sharing = [other for other in names if names[other] == tensor]
        module, _, kind = name.rpartition(".")
        stacked = tensor.count("{}")
        shape = parameters[name][stacked:]
        inputs = 2 if module.endswith("attention.out") else 1  # [N, H, D]
        matrix = math.prod(shape[:inputs]), math.prod(shape[inputs:])
        if kind in VECTORS:
            matrix = (math.prod(shape),) if shape else ()
        elif module.endswith("patch"):
            matrix = shape
        is_linear = transposed or not module.startswith("layers.")
        for index in np.ndindex(parameters[name][:stacked]):
            found.append(
                ParameterSlice(
                    parameter=name,
                    index=index,
                    shape=shape,
                    tensor=tensor.format(*index),
                    part=sharing.index(name),
                    parts=len(sharing),
                    matrix=matrix,
                    transposed=is_linear and module.rpartition(".")[2] not in TABLES,
                    ones=(ones or {}).get(tensor, 0),
                )
            )
    return found


def by_tensor(slices: Sequence[ParameterSlice]) -> dict[str, list[ParameterSlice]]:
    """{name of a tensor: the slices that it holds, in the order of its parts}."""
    found: dict[str, list[ParameterSlice]] = {}
    for one in slices:
        found.setdefault(one.tensor, []).append(one)
    return found


def tensor_shape(parts: Sequence[ParameterSlice]) -> Shape:
    """The shape of the tensor that holds `parts`."""
    first, sizes = parts[0], [part.matrix[-1:] for part in parts]
    shape = [*first.matrix[:-1], *(sum(size) for size in zip(*sizes, strict=True))]
    return (1,) * first.ones + tuple(shape[::-1] if first.transposed else shape)


def join(parts: Sequence[ParameterSlice], parameters: Mapping[str, Array]) -> np.ndarray:
    """The tensor that holds `parts` of parameters, by name."""
    arrays = [part.to_tensor(parameters[part.parameter]) for part in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=parts[0].shared_axis)


def shortened(names: Sequence[str], limit: int = 40) -> str:
    """The first names of a list, and the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
