"""Membership inference by loss (arXiv:1709.01604): training data has a lower loss than other data
of the same kind, as far as a model has memorized it.

The attack says "member" below a threshold. It is measured by the area under its ROC curve, and, as
an average hides the few sequences of which it is sure, by the share of members that it finds where
at most 1% of the non-members are taken for one (arXiv:2112.03570). A reference model's loss,
subtracted, takes away how hard a sequence is for any model (arXiv:2012.07805, section 5.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lm.generation.score import Report, Scorer
from lm.probes import intervals
from lm.probes.sequences import StoredSequence
from lm.probes.tables import Cell, Table


def losses(scorer: Scorer, sequences: Sequence[StoredSequence], *, report: Report) -> np.ndarray:
    """float64 [n]: nats per token of each sequence, after the token before it.

    scorer: without a start. A document's first token is not scored where nothing precedes it.
    """
    pairs = [(s.before, s.ids) if len(s.before) else (s.ids[:1], s.ids[1:]) for s in sequences]
    scores = scorer.score(*zip(*pairs, strict=True), report=report)
    return np.array([-score.logprob / score.tokens for score in scores])


def rows(
    members: Mapping[str, np.ndarray], others: np.ndarray, *, seed: int
) -> list[tuple[Cell, ...]]:
    """A row for each set of members: losses [n] against those of non-members [m]."""
    return [
        (
            name,
            len(values),
            len(others),
            intervals.bootstrap(intervals.auc, values, others, seed=seed),
            intervals.bootstrap(intervals.true_positive_rate, values, others, seed=seed),
            intervals.bootstrap(intervals.mean_difference, values, others, seed=seed),
        )
        for name, values in members.items()
    ]


def table(title: str, found: Sequence[Sequence[Cell]], unit: str, note: str) -> Table:
    return Table(
        "membership",
        title,
        ("members", "n", "non-members", "AUC", "TPR at 1% FPR", f"difference, {unit}"),
        found,
        f"{note} AUC of 0.5 and a TPR of 0.01 are chance. Difference: mean loss of the members "
        "less that of the non-members.",
        ("AUC",),
        chance=0.5,
    )
