"""Exponents of initial weights, steps and outputs in the width and depth of a model, as tables.

Hyper-parameters are tuned on a small model, the base, and mean the same on a wide and deep one:
each number of the base is multiplied by powers of

    width   embed_dim / base_embed_dim, in proportion to which mlp_dim and the heads grow
    depth   num_layers / base_num_layers
    head    head_dim / base_head_dim

At the base all factors are exactly 1, and every table is the standard parametrization, bit by bit.

`mup` is the maximal-update parametrization (arXiv:2203.03466): Table 8, in the form that lets the
vocabulary projection be the embedding, where the projection has a factor on its output rather than
smaller weights. Depth is CompleteP's (arXiv:2505.01618, alpha = 1): branches are added to the
residual stream with 1 / depth, so that a block keeps learning features however many there are.
Muon's steps have a given spectral norm, which has to go as the root of fan_out / fan_in
(arXiv:2310.17813); ours are multiplied by the root of the longer side, and so their learning rate
by width ** -0.5.

Weight decay is independent of a parameter's own learning rate: a step takes the fraction
learning_rate * weight_decay, of the base, from every width (so CompleteP; arXiv:2405.13698).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

RULES = ("adam", "lion", "muon", "adafactor", "sgd")  # kinds of steps
ROLES = ("embedding", "hidden", "router", "head", "vector")


@dataclasses.dataclass(frozen=True)
class Power:
    """width ** .width * depth ** .depth."""

    width: float = 0.0
    depth: float = 0.0  # only for what lies inside the blocks


ONE = Power()


@dataclasses.dataclass(frozen=True)
class RoleScaling:
    """Powers by which a role's parameters scale at other sizes than the base."""

    init: Power | None  # deviation at the start; None: what the config says, at the size itself
    rate: Mapping[str, Power]  # learning rate, by kind of step; a kind that is missing is refused


@dataclasses.dataclass(frozen=True)
class Table:
    rows: Mapping[str, RoleScaling]
    epsilon: Power = ONE  # Adam's, which has to shrink as gradients do
    logits: Power = ONE  # factor on the output of the head
    branch: Power = ONE  # factor on what a sublayer adds to the residual stream
    score: float = 0.0  # exponent of `head`, on the usual factor head_dim ** -0.5 of the scores


# Embedding and head agree, so that one table of vectors can be both. Learned positions, token types
# and relative biases are embeddings; vectors are biases, scales of norms.
TABLES = {
    "standard": Table(dict.fromkeys(ROLES, RoleScaling(None, dict.fromkeys(RULES, ONE)))),
    "mup": Table(
        {
            **dict.fromkeys(ROLES, RoleScaling(ONE, {"adam": ONE, "lion": ONE})),
            "hidden": RoleScaling(
                Power(-0.5), {"adam": Power(-1), "lion": Power(-1), "muon": Power(-0.5)}
            ),
            "router": RoleScaling(Power(-1), dict.fromkeys(("adam", "lion", "muon"), Power(-1))),
        },
        epsilon=Power(width=-1, depth=-1),
        logits=Power(-1),
        branch=Power(depth=-1),
        score=-0.5,
    ),
}


def role(path: Sequence[str], axes: Sequence[str | None]) -> str:
    """The row of a parameter with these names on its path and these logical axes, `layers` among
    them or not.
    """
    names = [a for a in axes if a != "layers"]
    if path[-1] == "bias" or len(names) < 2:
        return "vector"
    if path[-1] == "router":
        return "router"
    if names[-1] == "vocab":
        return "head"
    return "embedding" if "vocab" in names or None in names else "hidden"


def is_linear_map(path: Sequence[str], axes: Sequence[str | None]) -> bool:
    """True for the matrix of a linear map inside the model, with arguments as of `role`: no
    embedding, head, router, adapter or vector.
    """
    return role(path, axes) == "hidden" and "rank" not in axes


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A table at the sizes of a model; without arguments, the standard one."""

    name: str = "standard"
    width: float = 1.0
    depth: float = 1.0
    head: float = 1.0

    @property
    def _table(self) -> Table:
        return TABLES[self.name]

    def _factor(self, power: Power, in_block: bool = True) -> float:
        return self.width**power.width * (self.depth**power.depth if in_block else 1.0)

    def has(self, rule: str) -> bool:
        """True if the table has learning rates for this kind of step."""
        return rule in self._table.rows["hidden"].rate

    def init(self, role: str, init_std: float | None) -> float:
        """Factor on initial weights of deviation `init_std`, or fan_in ** -0.5 where it is None."""
        power = self._table.rows[role].init
        if power is None:
            return 1.0
        at_base = 1.0 if init_std is not None else self.width**0.5  # fan_in ** -0.5 of the base
        return at_base * self._factor(power)

    def init_layers(self, num_layers: int) -> float:
        """The layers whose number the initial weights of branches are made smaller for."""
        return num_layers if self._table.rows["hidden"].init is None else num_layers / self.depth

    def rate(self, role: str, rule: str, in_block: bool) -> float:
        return self._factor(self._table.rows[role].rate[rule], in_block)

    def epsilon(self, in_block: bool) -> float:
        return self._factor(self._table.epsilon, in_block)

    @property
    def logits(self) -> float:
        """Factor on the logits."""
        return self._factor(self._table.logits, in_block=False)

    @property
    def branch(self) -> float:
        """Factor on what a sublayer adds to the residual stream."""
        return self._factor(self._table.branch)

    @property
    def scores(self) -> float:
        """Factor on the scores of attention, beside head_dim ** -0.5."""
        return self.head**self._table.score


STANDARD = Scaling()
