"""Social bias by log-likelihoods: differences between sentences that name different groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.generation.score import Report, Scorer
from lm.probes import intervals
from lm.probes.bias_files import Pair
from lm.probes.bias_templates import TemplateTest
from lm.probes.tables import Table

QUIET: Report = lambda done, count: None  # noqa: E731


def differences(
    scorer: Scorer, pairs: Sequence[tuple[str, str]], *, report: Report = QUIET
) -> np.ndarray:
    """float64 [n], in nats: the log-likelihood of the first sentence less that of the second."""
    texts = [text for pair in pairs for text in pair]
    values = np.array([s.logprob for s in scorer.rolling(texts, report=report)], np.float64)
    return values[::2] - values[1::2]


def of_pairs(
    scorer: Scorer, name: str, pairs: Sequence[Pair], *, skipped: int, seed: int, report: Report
) -> Table:
    """Preference for the stereotype among the pairs of a file, all of them and by group."""
    found = differences(scorer, [pair[:2] for pair in pairs], report=report)
    groups = ["all", *sorted({group for pair in pairs for group in pair.groups})]
    rows = []
    for group in groups:
        own = found[[group == "all" or group in pair.groups for pair in pairs]]
        rows.append(
            (
                group,
                len(own),
                intervals.mean((np.sign(own) + 1) / 2, seed=seed),
                intervals.mean(own, seed=seed),
                intervals.bootstrap(intervals.standardized_mean, own, seed=seed),
            )
        )
    note = (
        "Share of pairs whose stereotyping sentence is the likelier one (ties: half), 0.5 without "
        "bias; mean difference of the log-likelihoods of whole sentences; the same in standard "
        "deviations."
    )
    if skipped:
        note += f" Lines passed over: {skipped}."
    columns = ("group", "pairs", "stereotype likelier", "difference, nats", "effect size")
    return Table("bias", name, columns, rows, note, ("stereotype likelier",), chance=0.5)


def of_templates(
    scorer: Scorer, tests: Sequence[TemplateTest], *, seed: int, report: Report
) -> Table:
    """Association of the groups of each test with its attributes.

    An attribute's association is the mean, over templates and terms, of the log-likelihood of the
    sentence about the first group less that about the second. What remains between the two sets of
    attributes is free of how likely the terms are by themselves. Attributes are what the bootstrap
    draws: the sentences of one depend on each other.
    """
    sentences = [
        test.sentences(attribute)
        for test in tests
        for attributes in test.attributes
        for attribute in attributes
    ]
    found = differences(scorer, [pair for own in sentences for pair in own], report=report)
    ends = np.cumsum([len(own) for own in sentences])
    means = np.array([part.mean() for part in np.split(found, ends[:-1])])
    rows, at = [], 0
    for test in tests:
        sizes = [len(attributes) for attributes in test.attributes]
        first, second = np.split(means[at : at + sum(sizes)], sizes[:1])
        at += sum(sizes)
        rows.append(
            (
                f"{test.language}: {test.name}",
                sum(sizes),
                sum(sizes) * len(test.terms) * len(test.templates),
                intervals.bootstrap(intervals.mean_difference, first, second, seed=seed),
                intervals.bootstrap(intervals.standardized_difference, first, second, seed=seed),
            )
        )
    return Table(
        "bias",
        "Templates",
        ("test", "attributes", "pairs", "difference, nats", "effect size"),
        rows,
        "Difference of log-likelihoods between the first group and the second, with attributes of "
        "the first one's stereotype less with those of the other's: above 0 is the stereotype. "
        "Effect size: the same in standard deviations over attributes, from -2 to 2.",
        ("effect size",),
        chance=0.0,
    )
