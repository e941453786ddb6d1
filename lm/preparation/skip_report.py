"""Skipped files and records: counts by reason, the first ids, and the share of the data lost."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field

from lm.sources import Skipped
from lm.storage.paths import printable

NUM_EXAMPLES = 3  # ids that are kept of each reason
_WHOLE_FILE = ("other_file_type", "damaged_file", "unreadable", "utf_16")
# Nothing is lost with these: they hold no text, or text that is read elsewhere.
_NO_LOSS = {
    *("duplicate", "empty", "white_space", "hidden", "folder_seen_before", "metadata", "no_page"),
}


def _is_loss(reason: str) -> bool:
    return reason not in _NO_LOSS and "/" not in reason  # FILTER/WHY: dropped on purpose


@dataclass
class SkipReport:
    """Skipped records of a part or of a corpus.

    counts: by reason. examples: by reason, the first ids, with details.
    num_bytes: of source, in files that are skipped as a whole. masked: what filters have masked in
    documents that are not skipped, by kind.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    num_bytes: int = 0
    masked: Counter[str] = field(default_factory=Counter)

    def add(self, skipped: Skipped, num_bytes: int = 0) -> None:
        """Count one; num_bytes: of source, where it is a whole file."""
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
        self.masked.update(other.masked)

    def to_json(self) -> bytes:
        return json.dumps([self.counts, self.examples, self.num_bytes, self.masked]).encode()

    @classmethod
    def from_json(cls, content: bytes) -> SkipReport:
        counts, examples, num_bytes, masked = json.loads(content)
        return cls(Counter(counts), examples, num_bytes, Counter(masked))

    def describe(self, *, lost_only: bool = False) -> str:
        """ "3 missing_field (a.jsonl@0 (it has body), ...), 1 other_file_type (b.parquet)"."""
        reasons = sorted(+self.counts, key=lambda reason: (not _is_loss(reason), reason))
        texts = {reason: f"{self.counts[reason]:,} {reason}" for reason in reasons}
        return ", ".join(
            f"{text} ({', '.join(self.examples[reason])})" if self.examples.get(reason) else text
            for reason, text in texts.items()
            if _is_loss(reason) or not lost_only
        )

    def advice(self) -> str:
        """ "; text is read as UTF-8: ..." where some was in another encoding, else ""."""
        if not any(self.counts[reason] for reason in ("invalid_utf8", "utf_16")):
            return ""
        return "; text is read as UTF-8: convert it with iconv -f ENCODING -t UTF-8 IN > OUT"

    def check(self, num_documents: int, *, max_loss: float) -> None:
        """Raise ValueError where more than `max_loss` of the records is lost."""
        if error := self.limit_error(num_documents, 0, max_loss=max_loss):
            raise ValueError(error)

    def limit_error(self, num_documents: int, num_bytes: int, *, max_loss: float) -> str:
        """Return the error where more than `max_loss` of the records or bytes is lost, else "".

        num_documents: those that were read. num_bytes: of source, of all units.
        """
        num_lost = sum(n for reason, n in self.counts.items() if _is_loss(reason))
        records = num_lost / max(num_lost + num_documents, 1)
        files = self.num_bytes / max(num_bytes, 1)
        if max(records, files) <= max_loss:
            return ""
        shares = {
            f"{num_lost:,} of {num_lost + num_documents:,} files and records ({records:.1%}) are "
            "no documents": records,
            f"files with {files:.1%} of the bytes are not read": files,
        }
        share = ", and ".join(text for text, lost in shares.items() if lost > max_loss)
        allowed = min(-(-max(records, files) * 100 // 1) / 100, 1.0)  # rounded up to percents
        return (
            f"{share}: {self.describe(lost_only=True)}{self.advice()}; name other --data or "
            f"--field, or allow it with --max-loss={allowed}"
        )
