"""Records for tasks: read from tables, SQuAD's files or Python's packages, and split by a key.

Records with the same key (a sentence with two translations, the questions of one paragraph, the
snippets of one file) are all in train or all in test, by a hash of the key.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from lm.preparation.corpus import Corpus, held_out, key_hash
from lm.preparation.parts import read_all
from lm.preparation.skip_report import SkipReport
from lm.sources import Document, Skipped
from lm.sources.file_source import FileSource
from lm.sources.records import from_record
from lm.storage.files import read_bytes, write_atomically
from lm.storage.paths import expand_path, printable

SNIPPET_LINES = 30
FORMATS = ("records", "squad", "packages")


class Example(NamedTuple):
    """A document, and the key that it is split by."""

    key: str
    document: Document | Skipped


def read(corpus: Corpus, form: str, key: str = "") -> Iterator[Example]:
    """Yield the examples of a corpus in order.

    form: "records", lines of jsonl or of tables, or TFDS, whose key is the field `key` (empty: the
    id); "squad", files of questions on paragraphs, by paragraph; "packages", snippets of the files
    of a folder or of "stdlib", by file. Raises ValueError where there is no such field or source.
    """
    if form not in FORMATS:
        raise ValueError(f"format {form!r} must be one of {', '.join(FORMATS)}")
    if key and (form != "records" or key not in corpus.columns):
        raise ValueError(
            f"key {key!r} must be one of the fields ({', '.join(corpus.columns)}) of records; "
            "squad and packages have their own"
        )
    if form == "records":
        for item in read_all(corpus):
            yield Example(item.fields[key] if key and isinstance(item, Document) else item.id, item)
    else:
        for spec in corpus.data:
            yield from {"squad": _squad, "packages": _packages}[form](spec, corpus.columns)


def _squad(spec: str, columns: Mapping[str, str]) -> Iterator[Example]:
    """Columns: question, context, title, answer (the first one), answers (each once, a line each).

    The key is the number of the paragraph in the file, so that translations of a file, question by
    question, are split alike.
    """
    path = expand_path(spec, "--data")
    try:
        articles = json.loads(read_bytes(path).decode("utf-8-sig"))["data"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no file of SQuAD's form ({error})") from None
    for a, article in enumerate(articles):
        for p, paragraph in enumerate(article.get("paragraphs", ())):
            for q, question in enumerate(paragraph.get("qas", ())):
                name = f"{os.path.basename(path)}@{question.get('id', f'{a}/{p}/{q}')}"
                try:
                    answers = dict.fromkeys(answer["text"] for answer in question["answers"])
                    record = {
                        "question": question["question"],
                        "context": paragraph["context"],
                        "title": article.get("title", ""),
                        "answer": next(iter(answers), ""),
                        "answers": "\n".join(answers),
                    }
                except KeyError:
                    yield Example(f"{a}/{p}", Skipped(name, "missing_field", tuple(question)))
                    continue
                yield Example(f"{a}/{p}", from_record(name, record, columns))


def _packages(spec: str, columns: Mapping[str, str]) -> Iterator[Example]:
    """Columns: text, consecutive lines of a file; package, the first folder of its path.

    Files outside of packages, and the lines after a file's last whole snippet, are dropped.
    """
    source = FileSource(spec, {"text": "text"})
    for unit in source.units():
        package, _, rest = unit.name.partition(os.sep)
        for item in source.read(unit) if rest else ():
            if isinstance(item, Skipped):
                yield Example(unit.name, item)
                continue
            lines = item.fields["text"].splitlines()
            for start in range(0, len(lines) - SNIPPET_LINES + 1, SNIPPET_LINES):
                text = "\n".join(lines[start : start + SNIPPET_LINES]).strip()
                record = {"text": text, "package": package}
                document = from_record(f"{unit.name}@{start}", record, columns)
                yield Example(unit.name, document)


def keep_labels(examples: Iterable[Example], field: str, labels: set[str]) -> Iterator[Example]:
    """Yield the examples whose `field` is one of `labels`."""
    for example in examples:
        document = example.document
        if isinstance(document, Skipped) or document.fields[field] in labels:
            yield example


def write(
    examples: Iterable[Example],
    out: str | os.PathLike,
    *,
    test_fraction: float,
    train_limit: int,
    max_loss: float = 1.0,
) -> dict[str, Counter]:
    """Write OUT/train.jsonl and OUT/test.jsonl; return their numbers of records, and of others by
    the reason why they were skipped.

    train_limit: size of a sample of train, by a hash of the ids; 0: all records.
    max_loss: share of the records that may be skipped. Raises ValueError where more are, or one of
    the two would be empty.
    """
    folder = expand_path(os.fspath(out), "--out").rstrip("/") or "/"
    report = SkipReport()
    counts = {split: Counter() for split in ("train", "test")}
    found: dict[str, list[Document]] = {"train": [], "test": []}
    seen = set()
    for key, item in examples:
        split = "test" if held_out(key, test_fraction) else "train"
        if isinstance(item, Skipped):
            counts[split][item.reason] += 1
            report.add(item)
        elif (content := tuple(item.fields.items())) in seen:
            counts[split]["duplicate"] += 1
        else:
            seen.add(content)
            found[split].append(item)
    report.check(sum(map(len, found.values())), max_loss=max_loss)
    if train_limit and len(found["train"]) > train_limit:
        chosen = {d.id for d in sorted(found["train"], key=lambda d: key_hash(d.id))[:train_limit]}
        counts["train"]["over the limit"] = len(found["train"]) - len(chosen)
        found["train"] = [document for document in found["train"] if document.id in chosen]
    for split, documents in found.items():
        if not documents:
            raise ValueError(
                f"no record is left for {split}; skipped: {dict(counts[split]) or 'none'}; test "
                f"fraction {test_fraction}"
            )
        counts[split]["records"] = len(documents)
    for split, documents in found.items():
        records = [{"id": printable(d.id), **d.fields} for d in documents]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        write_atomically(f"{folder}/{split}.jsonl", "".join(lines))
    return counts
