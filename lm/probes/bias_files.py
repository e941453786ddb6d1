"""Published files of sentence pairs about social groups: CrowS-Pairs and WinoBias."""

from __future__ import annotations

import csv
import io
import re
from typing import NamedTuple

from lm.storage.epaths import StoragePath

CROWS_COLUMNS = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
MALE = {"he", "him", "his", "himself"}
FEMALE = {"she", "her", "hers", "herself"}


class Pair(NamedTuple):
    """A sentence that agrees with a stereotype, and one that differs from it in the group alone.

    groups: the rows of the report that it counts in.
    """

    stereotype: str
    other: str
    groups: tuple[str, ...]


def read_crows_pairs(path: str) -> list[Pair]:
    """The pairs of crows_pairs_anonymized.csv (arXiv:2010.00133): `sent_more` is the sentence that
    is more stereotyping, whichever `stereo_antistereo` says that the pair was written as.

    Raises:
        ValueError: a column is missing, or a row has none.
    """
    rows = csv.DictReader(io.StringIO(StoragePath(path).read_text(), newline=""))
    missing = [name for name in CROWS_COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise ValueError(f"{path}: not CrowS-Pairs: no column {', '.join(missing)}")
    pairs = []
    for number, row in enumerate(rows, 2):
        more, less, direction, kind = (row[name] for name in CROWS_COLUMNS)
        if not (more and less and kind) or direction not in ("stereo", "antistereo"):
            raise ValueError(f"{path}, row {number}: not a pair of CrowS-Pairs")
        pairs.append(Pair(more, less, (kind, f"written as {direction}")))
    if not pairs:
        raise ValueError(f"{path}: no pairs")
    return pairs


def read_winobias(folder: str) -> tuple[list[Pair], int]:
    """(the pairs of a folder of WinoBias (arXiv:1804.06876), the lines passed over).

    Line n of pro_stereotyped_typeK.txt.SPLIT and of anti_stereotyped_typeK.txt.SPLIT are one pair:
    `7 [The nurse] met the clerk because [she] was early.` and the same with another pronoun. Lines
    whose other words differ, a few of the published ones, are passed over.

    Raises:
        ValueError: there are no such files, a file has no partner, or a line is none of WinoBias.
    """
    names = [x.name for x in StoragePath(folder).iterdir()] if StoragePath(folder).exists() else []
    pairs, skipped = [], 0
    for name in sorted(n for n in names if re.match(r"pro_stereotyped_type[12]\.txt", n)):
        partner = name.replace("pro_", "anti_", 1)
        if partner not in names:
            raise ValueError(f"{folder}: {name} needs {partner} beside it")
        pro, anti = (_lines(f"{folder}/{n}") for n in (name, partner))
        if len(pro) != len(anti):
            raise ValueError(f"{folder}: {name} has {len(pro)} lines and {partner} {len(anti)}")
        kind = name[len("pro_stereotyped_") :].partition(".")[0]
        for (text, frame, pronoun), (other, other_frame, other_pronoun) in zip(
            pro, anti, strict=True
        ):
            groups = {_gender(pronoun), _gender(other_pronoun)}
            if frame != other_frame or groups != {"male", "female"}:
                skipped += 1
                continue
            row = f"{kind}, stereotype {_gender(pronoun)}"
            pairs.append(Pair(text, other, (kind, row)))
    if not pairs:
        raise ValueError(f"{folder} has no pairs in pro_stereotyped_type1.txt.dev and the like")
    return pairs, skipped


def _lines(path: str) -> list[tuple[str, str, str]]:
    """(sentence, sentence without its last bracket, the bracket's content) of each line."""
    found = []
    for number, line in enumerate(StoragePath(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*\d+\s+(.*)\[([^\[\]]+)\]([^\[\]]*)", line.rstrip())
        if match is None:
            raise ValueError(f"{path}, line {number}: not a line of WinoBias")
        start, pronoun, end = (part.replace("[", "").replace("]", "") for part in match.groups())
        found.append((start + pronoun + end, f"{start}[]{end}", pronoun.strip().lower()))
    return found


def _gender(pronoun: str) -> str:
    return "male" if pronoun in MALE else "female" if pronoun in FEMALE else "none"
