"""Manifest of a checkpoint: checksums of all its bits, its config, data totals, code and parent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lm.checkpoint.checksums import hexadecimal
from lm.config import conversion
from lm.config.tree import ConfigTree
from lm.optim.param_tree import named_leaves
from lm.types import PyTree

FORMAT = 1
# Ends of the names of leaves that older optimizers kept in their state, and no run restores: of
# Muon the coefficients of its polynomials.
CONSTANTS = (".ns_coeffs",)


class Damaged(ValueError):
    """A file of a checkpoint doesn't hold what was written."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    checksum: str = ""  # 16 hex digits; empty for an abstract array

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def leaves(tree: PyTree, sums: np.ndarray | None = None) -> dict[str, Leaf]:
    """Descriptions of all leaves of a tree by their path, such as "params.layers.mlp.up.weight".

    sums: the checksums of the leaves in the tree's order, uint32 [leaves, 2].
    """
    return {
        name: Leaf(
            tuple(x.shape), str(np.dtype(x.dtype)), "" if sums is None else hexadecimal(sums[i])
        )
        for i, (name, x) in enumerate(named_leaves(tree).items())
    }


def differences(stored: Mapping[str, Leaf], expected: Mapping[str, Leaf]) -> list[str]:
    """One line for each leaf that only one side has, or whose shape or dtype differs."""
    lines = [
        f"only in the checkpoint: {n}, {stored[n]}"
        for n in stored
        if n not in expected and not n.endswith(CONSTANTS)
    ]
    lines += [f"only in this run: {n}, {expected[n]}" for n in expected if n not in stored]
    lines += [
        f"differs: {n}, {stored[n]} in the checkpoint, {expected[n]} in this run"
        for n in stored
        if n in expected and str(stored[n]) != str(expected[n])
    ]
    return lines


def check_bits(stored: Mapping[str, Leaf], checksums: Mapping[str, str]) -> None:
    """Raise Damaged unless all leaves of `stored` have these checksums."""
    wrong = [name for name, leaf in stored.items() if leaf.checksum != checksums[name]]
    if wrong:
        name, others = wrong[0], f" and {len(wrong) - 1} other leaves" if wrong[1:] else ""
        raise Damaged(
            f"{name}{others}: checksum {checksums[name]}, the manifest says {stored[name].checksum}"
        )


def fingerprint(described: Mapping[str, Leaf]) -> str:
    """A hash of the names, shapes and bits of leaves."""
    return _digest({name: dataclasses.asdict(leaf) for name, leaf in described.items()})


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The record beside the arrays of a checkpoint."""

    step: int
    leaves: dict[str, Leaf]
    ledger: dict[str, Any] = dataclasses.field(default_factory=dict)  # totals of the data consumed
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    code: dict[str, Any] = dataclasses.field(default_factory=dict)  # see code_version.py
    # batch_size, num_steps, and `Teacher.describe` as teacher where there is one
    resolved: dict[str, Any] = dataclasses.field(default_factory=dict)
    parent: dict[str, Any] | None = None  # `ParentCheckpoint.describe` of what the run started from
    time: float = 0.0  # seconds since 1970
    format: int = FORMAT

    @property
    def has_only_params(self) -> bool:
        """True for an import, which has no optimizer state."""
        return all(name.startswith("params.") for name in self.leaves)

    def config_tree(self) -> ConfigTree:
        return conversion.from_json(json.dumps(self.config))

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, with a hash over them that reveals a change in any."""
        tree = dataclasses.asdict(self)
        return {**tree, "sha256": _digest(tree)}

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """The manifest whose `to_dict` was written.

        Raises:
            Damaged: the text is not what was written.
            ValueError: it was written by newer code.
        """
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise Damaged(f"the manifest is no JSON: {error}") from None
        if not isinstance(tree, dict) or tree.pop("sha256", None) != _digest(tree):
            raise Damaged("the manifest's hash is not that of its content")
        if tree["format"] != FORMAT:
            raise ValueError(
                f"the manifest has format {tree['format']}, this code reads {FORMAT}: use the "
                f"code that wrote it ({tree.get('code')})"
            )
        described = {
            name: Leaf(tuple(leaf["shape"]), leaf["dtype"], leaf["checksum"])
            for name, leaf in tree.pop("leaves").items()
        }
        return cls(leaves=described, **tree)


def _digest(tree: dict[str, Any]) -> str:
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
