"""Files and records that are no documents: how many by reason, the first of each, and the share of
the data that is lost with them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lm.data.sources import Skipped
from lm.storage import printable

NUM_EXAMPLES = 3  # of each reason that are named
_WHOLE_FILE = ("other_file_type", "damaged_file", "unreadable", "utf_16")
# Nothing is lost with these: they hold no text, or text that is read elsewhere.
_NO_LOSS = {"duplicate", "empty", "white_space", "hidden", "folder_seen_before"}


@dataclass
class SkipReport:
    """Records of a part or of a corpus that were skipped.

    counts: by reason. examples: by reason, the first ids, with what helps to understand them.
    num_bytes: of source, of files that are lost as a whole.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    num_bytes: int = 0

    def add(self, skipped: Skipped, num_bytes: int = 0) -> None:
        """Counts one; num_bytes: of source, where it is a whole file."""
        self.counts[skipped.reason] += 1
        examples = self.examples.setdefault(skipped.reason, [])
        if len(examples) < NUM_EXAMPLES and skipped.reason != "duplicate":
            fields = ", ".join(skipped.fields[:20])
            detail = skipped.detail or (f"it has {fields}" if fields else "")
            examples.append(printable(f"{skipped.id} ({detail})" if detail else skipped.id))
        if skipped.reason in _WHOLE_FILE:
            self.num_bytes += num_bytes

    def update(self, other: SkipReport) -> None:
        self.counts.update(other.counts)
        for reason, examples in other.examples.items():
            kept = self.examples.setdefault(reason, [])
            kept += examples[: NUM_EXAMPLES - len(kept)]
        self.num_bytes += other.num_bytes

    @property
    def num_lost(self) -> int:
        return sum(n for reason, n in self.counts.items() if reason not in _NO_LOSS)

    def to_json(self) -> bytes:
        return json.dumps([self.counts, self.examples, self.num_bytes]).encode()

    @classmethod
    def from_json(cls, content: bytes) -> SkipReport:
        counts, examples, num_bytes = json.loads(content)
        return cls(Counter(counts), examples, num_bytes)

    def describe(self) -> str:
        """ "3 missing_field (a.jsonl@0 (it has body), ...), 1 other_file_type (b.parquet)"."""
        return ", ".join(
            f"{self.counts[reason]:,} {reason}{_listed(self.examples.get(reason, ()))}"
            for reason in sorted(+self.counts, key=lambda r: (r in _NO_LOSS, r))
        )

    def advice(self) -> str:
        """ "; text is read as UTF-8: ..." where some was in another encoding, else ""."""
        if not any(self.counts[reason] for reason in ("invalid_utf8", "utf_16")):
            return ""
        return "; text is read as UTF-8: convert it with iconv -f ENCODING -t UTF-8 IN > OUT"

    def check(self, num_documents: int, num_bytes: int, *, max_loss: float) -> None:
        """Raises ValueError where there is a `fault`."""
        if fault := self.limit_error(num_documents, num_bytes, max_loss=max_loss):
            raise ValueError(fault)

    def limit_error(self, num_documents: int, num_bytes: int, *, max_loss: float) -> str:
        """The error where more than `max_loss` of the records, or of the bytes, is lost, else "".

        num_documents: that are there. num_bytes: of source, of all units.
        """
        records = self.num_lost / max(self.num_lost + num_documents, 1)
        files = self.num_bytes / max(num_bytes, 1)
        if max(records, files) <= max_loss:
            return ""
        shares = {
            f"{self.num_lost:,} of {self.num_lost + num_documents:,} files and records "
            f"({records:.1%}) are no documents": records,
            f"files with {files:.1%} of the bytes are not read": files,
        }
        share = ", and ".join(text for text, lost in shares.items() if lost > max_loss)
        lost = SkipReport(Counter({r: n for r, n in self.counts.items() if r not in _NO_LOSS}))
        lost.examples = self.examples
        return (
            f"{share}: {lost.describe()}{lost.advice()}; name other --data or --field, "
            f"or allow it with --max-loss={_rounded_up(max(records, files))}"
        )


def describe_examples(examples: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each reason that has examples."""
    return [f"  {reason}: {', '.join(found)}" for reason, found in examples.items() if found]


def _listed(examples: Sequence[str]) -> str:
    return f" ({', '.join(examples)})" if examples else ""


def _rounded_up(share: float) -> float:
    return min(-(-share * 100 // 1) / 100, 1.0)
