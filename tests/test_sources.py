"""Files of every kind as documents: the same on a local disk and in (emulated) buckets."""

import gzip
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import uuid
import zlib

import numpy as np
import object_stores
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lm.preparation.corpus import Corpus
from lm.preparation.prepare import prepare
from lm.preparation.tokenizer_training import training_texts
from lm.sources import Document, Skipped, arrow, files, parquet, text
from lm.sources.file_source import FileSource
from lm.sources.records import from_record
from lm.storage import files as storage
from lm.storage import filesystems

TEXTS = [f"document {i} \u00e4\n" * (i % 7 + 1) for i in range(200)]


def read(spec, columns=None, **options):
    """The documents of all units; each is read by a source of its own, as another worker would."""
    source = FileSource(str(spec), columns or {"text": "text"}, **options)
    units = source.units()
    assert units == FileSource(str(spec), source.columns, **options).units()
    return [
        item for u in units for item in FileSource(str(spec), source.columns, **options).read(u)
    ]


def texts(items):
    return [i.fields["text"] if isinstance(i, Document) else i.reason for i in items]


def parquet_bytes(table, **options):
    pq.write_table(table, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def arrow_bytes(table, make=pa.ipc.new_stream, rows=20):
    with make(buffer := io.BytesIO(), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return buffer.getvalue()


def tar_bytes(members):
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def warc_bytes(records, *, compressed=True):
    """records: (type, URL, content, content type of a page or None)."""
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    writer = WARCWriter(buffer := io.BytesIO(), gzip=compressed)
    for kind, url, content, content_type in records:
        http = content_type and StatusAndHeaders(
            "200 OK", [("Content-Type", content_type)], "HTTP/1.1"
        )
        headers = {"WARC-Identified-Content-Language": "eng"} if kind == "conversion" else {}
        writer.write_record(
            writer.create_warc_record(
                url, kind, io.BytesIO(content), http_headers=http or None, warc_headers_dict=headers
            )
        )
    return buffer.getvalue()


TABLE = pa.table({"id": range(200), "text": TEXTS, "by": [{"name": f"n{i}"} for i in range(200)]})
LINES = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()
SAMPLES = [(f"a/{i:03d}.txt", text.encode()) for i, text in enumerate(TEXTS)]
SAMPLES += [(f"a/{i:03d}.jpg", b"\xff") for i in range(200)]
SAMPLES.sort()
EVERY_KIND = {
    "a.jsonl": lambda: LINES,
    "a.jsonl.gz": lambda: gzip.compress(LINES[:1000]) + gzip.compress(LINES[1000:]),
    "a.jsonl.zst": lambda: zstandard.compress(LINES),
    "c4.json.gz": lambda: gzip.compress(LINES),
    "a.parquet": lambda: parquet_bytes(TABLE, row_group_size=30),
    "stream.arrow": lambda: arrow_bytes(TABLE),
    "file.arrow": lambda: arrow_bytes(TABLE, pa.ipc.new_file),
    "a.tar": lambda: tar_bytes(SAMPLES),
    "a.tar.gz": lambda: gzip.compress(tar_bytes(SAMPLES)),
    "b.tgz": lambda: gzip.compress(tar_bytes(SAMPLES)),
}


PLACES = [
    pytest.param(place, name, marks=pytest.mark.slow if place == "s3" and name in slow else ())
    for slow in [EVERY_KIND.keys() - {"a.jsonl.gz", "a.parquet"}]
    for place in ("local", "gs", "s3")
    for name in EVERY_KIND
]


@pytest.mark.parametrize(("folder", "name"), PLACES, indirect=["folder"])
def test_every_kind_of_file_gives_its_documents_in_order(folder, name, monkeypatch):
    monkeypatch.setattr(storage, "BLOCK", 9000)  # so that a file has many
    storage.write_atomically(f"{folder}/sub/{name}", EVERY_KIND[name]())
    whole = read(folder)
    assert texts(whole) == TEXTS
    assert all(item.id.startswith(f"sub/{name}@") for item in whole)
    for module, size in ((text, "_RANGE"), (parquet, "_UNIT_BYTES"), (arrow, "_UNIT_BYTES")):
        monkeypatch.setattr(module, size, 3000)
    assert read(folder) == whole
    streamed = name.endswith(("gz", ".zst", ".tar"))
    assert (len(FileSource(folder, {"text": "text"}).units()) > 2) != streamed
    [pattern] = [f"{folder}/**/*{name[-4:]}"]
    assert read(pattern) == whole
    assert texts(read(f"{folder}/sub/{name}")) == TEXTS


def test_units_of_a_large_table_hold_each_row_once(tmp_path, monkeypatch):
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        (tmp_path / name).write_bytes(EVERY_KIND[name]())
        whole = read(tmp_path / name)
        for size in (1, 500, 5000):
            monkeypatch.setattr(parquet, "_UNIT_BYTES", size)
            monkeypatch.setattr(arrow, "_UNIT_BYTES", size)
            units = FileSource(str(tmp_path / name), {"text": "text"}).units()
            assert read(tmp_path / name) == whole
            assert all(a.stop == b.start for a, b in itertools.pairwise(units))
        monkeypatch.undo()


def test_batches_with_dictionaries_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow, "_UNIT_BYTES", 100)
    table = pa.table({"text": pa.array(TEXTS).dictionary_encode()})
    for name, make in (("a.arrow", pa.ipc.new_stream), ("b.arrow", pa.ipc.new_file)):
        (tmp_path / name).write_bytes(arrow_bytes(table, make))
        assert texts(read(tmp_path / name)) == TEXTS


def test_a_saved_folder_of_hugging_face_is_read_without_its_metadata(tmp_path):
    for i in range(2):
        part = arrow_bytes(TABLE.slice(100 * i, 100))
        (tmp_path / f"data-0000{i}-of-00002.arrow").write_bytes(part)
    for name in ("state.json", "dataset_info.json", "a.lock"):
        (tmp_path / name).write_text('{\n  "features": {}\n}')
    assert texts(read(tmp_path)) == TEXTS
    skipped = FileSource(str(tmp_path), {"text": "text"}).skipped_files()
    assert {item.reason for item in skipped} == {"metadata"}


def test_classes_of_hugging_face_have_their_names(tmp_path):
    features = {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}, "text": {}}
    table = pa.table({"text": ["a", "b", "c", "d"], "label": [1, 0, -1, None]})
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(table))
    (tmp_path / "a.arrow").write_bytes(arrow_bytes(table))
    for name in ("a.parquet", "a.arrow"):
        found = texts(read(tmp_path / name, {"text": "{label}: {text}"}))
        assert found == ["good: a", "bad: b", "empty", "empty"]


@pytest.mark.slow
def test_what_hugging_face_writes_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    messages = [[{"role": "user", "content": t}, {"role": "tool", "content": None}] for t in TEXTS]
    columns = {"text": TEXTS, "messages": messages, "label": [i % 2 for i in range(200)]}
    made = datasets.Dataset.from_dict(columns)
    made = made.cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
    made.save_to_disk(tmp_path / "saved", num_shards=3)
    datasets.DatasetDict(train=made, test=made).save_to_disk(tmp_path / "dict")
    made.to_parquet(tmp_path / "a.parquet")
    made.map(lambda record: record, cache_file_name=str(tmp_path / "cache" / "a.arrow"))
    for spec in ("saved", "dict/train", "a.parquet", "cache"):
        assert texts(read(tmp_path / spec)) == TEXTS
        labels = texts(read(tmp_path / spec, {"text": "label"}))
        assert labels == ["bad", "good"] * 100
        [first, *_] = texts(read(tmp_path / spec, {"text": "messages"}))
        assert first == f"user: {TEXTS[0]}\ntool: "


def test_files_of_a_bucket_are_found_as_those_of_a_folder(folder, tmp_path):
    names = ("a.txt", "b/c.txt", "b/d/e.txt", ".h/f.txt", "b/.g.txt", "b/x.md", "q[1]/*.txt")
    folder += "/here"
    for name in names:
        storage.write_atomically(f"{folder}/{name}", name)
        storage.write_atomically(f"{folder}after/{name}", name)
        storage.write_atomically(str(tmp_path / "there" / name), name)
    specs = (
        "",
        "/",
        "/*.txt",
        "/**/*.txt",
        "/b",
        "/b/**",
        "/*/*.txt",
        "/**/.*.txt",
        "/q[1]/*.txt",
        "/b/[c]*",
    )
    for spec in specs:
        assert read(folder + spec) == read(f"{tmp_path}/there{spec}"), spec
    source, local = (FileSource(s, {"text": "text"}) for s in (folder, f"{tmp_path}/there"))
    assert source.skipped_files() == local.skipped_files()
    for spec in ("/none", "/none/*.txt", "/*.none"):
        with pytest.raises(ValueError, match="no file matches"):
            FileSource(folder + spec, {"text": "text"}).units()


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_bucket_that_is_not_there_is_one_error(buckets, scheme):
    for spec in ("", "/a.txt", "/*.txt"):
        with pytest.raises(OSError, match=f"no bucket {scheme}://nobody-has-it"):
            FileSource(f"{scheme}://nobody-has-it{spec}", {"text": "text"}).units()


def test_a_file_changed_after_planning_is_an_error(folder):
    storage.write_atomically(f"{folder}/a.txt", "before")
    source = FileSource(folder, {"text": "text"})
    [unit] = source.units()
    storage.write_atomically(f"{folder}/a.txt", "after!")
    with pytest.raises(ValueError, match="was changed"):
        list(source.read(unit))


def test_a_bucket_that_stops_answering_is_no_damage_of_the_data(buckets, monkeypatch):
    folder = f"gs://{object_stores.BUCKET}/{uuid.uuid4().hex}"
    storage.write_atomically(f"{folder}/a.jsonl", LINES)
    source = FileSource(folder, {"text": "text"})
    [unit] = source.units()

    def fail(*_, **__):
        raise filesystems.StorageError("no answer")

    monkeypatch.setattr(storage, "read_bytes", fail)
    with pytest.raises(filesystems.StorageError):
        list(source.read(unit))


@pytest.mark.parametrize("name", [n for n in EVERY_KIND if n not in ("a.jsonl", "c4.json.gz")])
def test_damaged_files_are_counted(tmp_path, monkeypatch, name):
    content = EVERY_KIND[name]()
    damages = {"cut": content[: len(content) // 2], "other": b"no such format\n" * 50}
    if not name.endswith("jsonl.gz"):
        middle = len(content) // 2
        damages["middle"] = content[: middle - 300] + b"\xff" * 600 + content[middle + 300 :]
    for size in (3000, 1 << 26):
        monkeypatch.setattr(parquet, "_UNIT_BYTES", size)
        monkeypatch.setattr(arrow, "_UNIT_BYTES", size)
        for kind, damaged in damages.items():
            (tmp_path / name).write_bytes(damaged)
            items = read(tmp_path / name)
            assert not set(texts(items)) - {*TEXTS, "damaged_file", "invalid_utf8"}, kind
            reasons = [item for item in items if getattr(item, "reason", "") == "damaged_file"]
            assert kind == "middle" or reasons
            assert all(item.detail for item in reasons)
            assert len(texts(items)) < len(TEXTS) or kind == "middle"


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "a.jsonl.gz"])
def test_damaged_files_of_a_bucket_are_counted(buckets, monkeypatch, name):
    monkeypatch.setattr(parquet, "_UNIT_BYTES", 3000)
    monkeypatch.setattr(arrow, "_UNIT_BYTES", 3000)
    folder = f"gs://{object_stores.BUCKET}/{uuid.uuid4().hex}"
    content = EVERY_KIND[name]()
    for damaged in (content[: len(content) // 2], b"no such format\n" * 500):
        storage.write_atomically(f"{folder}/{name}", damaged)
        assert texts(read(folder))[-1] == "damaged_file"


@pytest.mark.slow
def test_files_are_read_although_requests_fail(monkeypatch):
    folder = f"gs://{object_stores.BUCKET}/a"
    with object_stores.in_this_process(fail=0.2), monkeypatch.context() as patch:
        patch.setattr(storage, "BLOCK", 2000)
        for name in ("a.jsonl.gz", "a.parquet", "stream.arrow"):
            storage.write_atomically(f"{folder}/{name}", EVERY_KIND[name]())
            assert texts(read(f"{folder}/{name}")) == TEXTS


def test_a_small_file_of_a_bucket_is_two_requests(buckets, monkeypatch):
    folder = f"gs://{object_stores.BUCKET}/{uuid.uuid4().hex}"
    storage.write_atomically(f"{folder}/a.txt", "text")
    source = FileSource(folder, {"text": "text"})
    [unit] = source.units()
    calls = []
    for function in ("stat", "read_bytes", "find", "is_folder"):
        original = getattr(storage, function)
        monkeypatch.setattr(
            storage, function, lambda *a, f=function, o=original: (calls.append(f), o(*a))[1]
        )
    assert texts(source.read(unit)) == texts(source.read(unit)) == ["text"]
    assert calls == ["is_folder", *2 * ["stat", "read_bytes"]]  # the first: once a worker


def test_a_stream_of_arrow_in_a_bucket_is_read_once(buckets, monkeypatch):
    folder = f"gs://{object_stores.BUCKET}/{uuid.uuid4().hex}"
    content = arrow_bytes(pa.concat_tables([TABLE] * 10))
    storage.write_atomically(f"{folder}/a.arrow", content)
    monkeypatch.setattr(storage, "BLOCK", 50_000)
    sizes = []
    original = storage.read_bytes
    monkeypatch.setattr(
        storage, "read_bytes", lambda *a: (sizes.append(a[2] - a[1]), original(*a))[1]
    )
    assert texts(read(folder)) == TEXTS * 10
    assert sum(sizes) < 1.5 * len(content) and len(sizes) < 8


def test_a_table_without_the_column_says_which_it_has(tmp_path):
    (tmp_path / "a.parquet").write_bytes(EVERY_KIND["a.parquet"]())
    (tmp_path / "b.arrow").write_bytes(EVERY_KIND["stream.arrow"]())
    for name in ("a.parquet", "b.arrow"):
        items = read(tmp_path / name, {"text": "body"})
        assert len(items) == 200 and {i.reason for i in items} == {"missing_field"}
        assert items[-1].fields == ("text", "by.name")
        assert len({item.id for item in items}) == 200


def test_null_and_undecodable_rows_are_skipped_alone(tmp_path):
    column = pa.array([b"one", b"\xff", None, b"four"], pa.binary()).view(pa.string())
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(pa.table({"text": column})))
    (tmp_path / "a.arrow").write_bytes(arrow_bytes(pa.table({"text": column})))
    for name in ("a.parquet", "a.arrow"):
        assert texts(read(tmp_path / name)) == ["one", "invalid_utf8", "empty", "four"]
    (tmp_path / "a.parquet").write_bytes(
        parquet_bytes(pa.table({"text": pa.array([], pa.string())}))
    )
    assert read(tmp_path / "a.parquet") == [Skipped("a.parquet", "empty")]


PART = {"type": "text"}
RECORD = {
    "message": {"content": "inside", "author": None},
    "a.b": "a key with a dot",
    "answers": [{"text": "first"}, {"text": "second"}],
    "messages": [
        {"role": "system", "content": None, "name": None},
        {"role": "user", "content": [PART | {"text": "2 + "}, PART | {"text": "2?"}]},
        {"role": "assistant", "content": "4"},
    ],
    "calls": [{"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}],
    "picture": [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}],
    "paragraphs": ["one", "two"],
}


@pytest.mark.parametrize(
    ("column", "found"),
    [
        ("message.content", "inside"),
        ("message.author", "empty"),
        ("message.author.name", "empty"),
        ("message.none", "missing_field"),
        ("a.b", "a key with a dot"),
        ("answers.1.text", "second"),
        ("{answers.0.text}, {answers.1.text}", "first, second"),
        ("answers.2.text", "missing_field"),
        ("answers", "field_is_not_text"),
        ("message", "field_is_not_text"),
        ("messages", "system: \nuser: 2 + 2?\nassistant: 4"),
        ("messages.1.content", "2 + 2?"),
        ("{messages}!", "system: \nuser: 2 + 2?\nassistant: 4!"),
        ("calls", "field_is_not_text"),
        ("picture", "field_is_not_text"),
        ("paragraphs", "field_is_not_text"),
        ("paragraphs.1", "two"),
        ("paragraphs.2", "missing_field"),
    ],
)
def test_columns_are_paths_and_dialogues(tmp_path, column, found):
    (tmp_path / "a.jsonl").write_text(json.dumps(RECORD))
    assert texts(read(tmp_path / "a.jsonl", {"text": column})) == [found]
    if column in ("calls", "picture"):
        return
    # a column has one type: content is a list of parts in each message
    rows = [{k: v for k, v in RECORD.items() if k not in ("calls", "picture")}] * 2
    parts = json.dumps(rows).replace('"content": "4"', '"content": [{"type": "text", "text": "4"}]')
    table = pa.Table.from_pylist(json.loads(parts))
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(table))
    assert texts(read(tmp_path / "a.parquet", {"text": column})) == [found] * 2


def test_texts_in_lists_are_named():
    record = {"paragraphs": ["one", "two"], "rows": [{"a": "a text"}]}
    found = from_record("id", record, {"text": "paragraphs"})
    assert found.detail == "paragraphs has 2 texts: paragraphs.0 is the first"
    missing = from_record("id", record, {"text": "text"})
    assert missing.fields == ("rows.0.a", "paragraphs.0")


def test_a_dialogue_is_written_as_the_default_template_writes_it():
    from lm.generation.chat import Chat
    from lm.tokenizers import tokenizer

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    document = from_record("id", {"messages": messages}, {"text": "messages"})
    rendered = Chat(tokenizer.load("bytes")).render(messages, add_generation_prompt=False)
    eos = rendered.removeprefix(document.fields["text"])
    assert document.fields["text"] == "user: hi\nassistant: yes" and "\n" not in eos


def test_fields_of_a_webdataset_are_kinds_and_keys(tmp_path):
    members = [
        ("x/1.json", b'{"caption": "one", "text": "in json"}'),
        ("x/1.txt", b"first"),
        ("x/1.seg.txt", b"part"),
        ("x/2.json", b'{"caption": "two", "text": "second"}'),
        ("x/2.png", b"\x89"),
        ("x/3.png", b"\x89"),
        ("x/4.json", b"{"),
        ("__index__", b""),
        ("x/5.TXT", b"fifth"),
    ]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    items = read(tmp_path / "a.tar")
    assert texts(items) == ["first", "second", "missing_field", "malformed_json", "fifth"]
    assert [item.id for item in items] == [f"a.tar@x/{i}" for i in range(1, 6)]
    captions = read(tmp_path / "a.tar", {"text": "json.caption", "more": "caption"})
    assert texts(captions)[:2] == ["one", "two"]
    assert texts(read(tmp_path / "a.tar", {"text": "seg.txt"}))[0] == "part"


def test_wet_files_give_their_texts(folder):
    pytest.importorskip("warcio")
    records = [("warcinfo", "urn:x", b"software: test\r\n", None)]
    records += [
        ("conversion", f"http://a/{i}", f"text {i} \u00e4".encode(), None) for i in range(50)
    ]
    for name, compressed in (("a.warc.wet.gz", True), ("b.wet", False)):
        content = warc_bytes(records, compressed=compressed)
        storage.write_atomically(f"{folder}/{name}", content)
        items = read(f"{folder}/{name}", {"text": "text", "source": "url"})
        assert texts(items) == [f"text {i} \u00e4" for i in range(50)]
        assert items[7] == Document(f"{name}@8", {"text": "text 7 \u00e4", "source": "http://a/7"})
        assert read(f"{folder}/{name}", {"text": "language"})[0].fields == {"text": "eng"}
        storage.write_atomically(f"{folder}/{name}", content[: len(content) // 2 + 11])
        *documents, last = read(f"{folder}/{name}")
        assert 20 < len(documents) < 30 and (last.id, last.reason) == (name, "damaged_file")
        storage.write_atomically(f"{folder}/{name}", b"no such format\n" * 50)
        assert texts(read(f"{folder}/{name}")) == ["damaged_file"]
    storage.write_atomically(f"{folder}/b.wet", content[: content.index(b"text 30") + 3])
    assert texts(read(f"{folder}/b.wet"))[29:] == ["text 29 \u00e4", "damaged_file"]


def test_pages_of_web_archives_give_their_main_text(tmp_path):
    pytest.importorskip("warcio"), pytest.importorskip("trafilatura")
    sentence = "The river runs from the mountains to the sea, and the town lies between them. "
    page = f"<html><body><nav>Menu</nav><article><p>{sentence * 5}</p></article></body></html>"
    records = [
        ("request", "http://a/", b"GET", None),
        ("response", "http://a/", page.encode(), "text/html; charset=utf-8"),
        ("response", "http://a/p.png", b"\x89", "image/png"),
        ("response", "http://a/none", b"<html></html>", "text/html"),
    ]
    (tmp_path / "a.warc.gz").write_bytes(warc_bytes(records))
    items = read(tmp_path / "a.warc.gz")
    assert texts(items) == [(sentence * 5).strip(), "no_page", "empty"]


@pytest.mark.parametrize(
    ("name", "package"), [("a.wet.gz", "warcio"), ("a.warc.gz", "trafilatura")]
)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, name, package):
    import importlib.util

    (tmp_path / name).write_bytes(b"")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == package else find(n) or n
    )
    with pytest.raises(ValueError, match=f"needs {package}: pip install {package}"):
        FileSource(str(tmp_path / name), {"text": "text"}).units()


def test_the_columns_that_records_have_begin_with_the_longest_text(tmp_path):
    record = {"id": 3, "key": "x1", "by": {"name": "me"}, "body": "a long text", "scores": [1, 2]}
    item = from_record("a", record, {"text": "text"})
    assert item == Skipped("a", "missing_field", ("body", "key", "by.name"))
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(
        ValueError, match=r"body, key, by\.name and not text: say --field=text=body"
    ):
        list(training_texts(Corpus(data=[str(tmp_path)]), sample_bytes=1000))


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_corpus_in_a_bucket_makes_the_stores_of_a_local_one(buckets, tmp_path, scheme):
    folder = f"{scheme}://{object_stores.BUCKET}/{uuid.uuid4().hex}"
    names = ("a.jsonl.gz", "a.parquet", "stream.arrow", "a.tar")
    for name in names:
        for place in (folder, tmp_path / "data"):
            storage.write_atomically(f"{place}/{name}", EVERY_KIND[name]())
    found = []
    for i, place in enumerate((tmp_path / "data", folder)):
        corpus = Corpus(data=[f"{place}/{name}" for name in names], columns={"text": "{text}"})
        prepare(corpus, tokenizer="bytes", out=tmp_path / str(i), num_workers=1)
        paths = [p for p in sorted((tmp_path / str(i)).rglob("*")) if p.is_file()]
        files = {p.relative_to(tmp_path / str(i)): p.read_bytes() for p in paths}
        found.append({path: data for path, data in files.items() if path.suffix != ".json"})
    assert found[0] == found[1] and len(found[0]) > 6


def test_json_that_is_no_lines_is_another_type_of_file(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_RANGE", 100)
    (tmp_path / "a.json").write_text(json.dumps([{"text": t} for t in TEXTS], indent=1))
    assert set(texts(read(tmp_path / "a.json"))) == {"other_file_type"}
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b"[" + LINES * 1000))
    assert texts(read(tmp_path / "b.json.gz")) == ["other_file_type"]
    long = [np.random.default_rng(i).bytes(size).hex() for i, size in enumerate((200_000, 10**6))]
    lines = "\n".join(json.dumps({"text": item}) for item in long)
    for content in (lines, "\n".join(lines.split("\n")[::-1])):  # longer than a block, too
        (tmp_path / "b.json.gz").write_bytes(gzip.compress(content.encode()))
        assert sorted(map(len, texts(read(tmp_path / "b.json.gz")))) == [400_000, 2_000_000]
    (tmp_path / "a.json").write_bytes(LINES)
    assert texts(read(tmp_path / "a.json")) == TEXTS
    assert read(tmp_path / "a.json")[1].id == f"a.json@{LINES.index(b'{', 1)}"


def test_a_compressed_file_is_streamed(tmp_path):
    """16 MiB of a gzip file are read, of 4 GiB of content."""
    with open(tmp_path / "a.jsonl.gz", "wb") as file:
        block = gzip.compress((json.dumps({"text": "x" * 1000}) + "\n").encode() * 16_000)
        for _ in range(256):
            file.write(block)
    source = FileSource(str(tmp_path / "a.jsonl.gz"), {"text": "text"})
    [unit] = source.units()
    documents = source.read(unit)
    assert sum(len(next(documents).fields["text"]) for _ in range(1000)) == 1_000_000
    documents.close()


MEMORY = """
import sys
from lm.sources.file_source import FileSource
source = FileSource(sys.argv[1], {"text": "text"})
print(sum(len(item.fields["text"]) for unit in source.units() for item in source.read(unit)))
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.tar.gz"])
def test_memory_does_not_grow_with_a_file(tmp_path, name):
    """800 MB of text; of Parquet in one row group."""
    texts = [np.random.default_rng(i).bytes(4000).hex() for i in range(1000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    with open(tmp_path / name, "wb") as file:
        if name == "a.parquet":
            whole = pa.concat_tables([pa.table({"text": texts})] * 100)
            pq.write_table(whole, file, use_dictionary=False, row_group_size=len(whole))
        elif name == "a.arrow":
            table = pa.table({"text": texts})
            with pa.ipc.new_stream(file, table.schema) as writer:
                for _ in range(100):
                    writer.write_table(table, max_chunksize=100)
        elif name == "a.tar.gz":
            compressor = zlib.compressobj(0, wbits=31)
            for i in range(100):
                members = [(f"{i}/{j}.txt", text.encode()) for j, text in enumerate(texts)]
                file.write(compressor.compress(tar_bytes(members)[: len(texts) * (8192 + 512)]))
            file.write(compressor.compress(bytes(1024)) + compressor.flush())
        else:
            block = (gzip if name.endswith("gz") else zstandard).compress(lines)
            file.write(block * 100)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    length, megabytes = map(int, done.stdout.split())
    assert length == 800_000_000 and megabytes < 200


def test_sources_of_a_corpus_take_every_kind(tmp_path):
    for name in ("a.parquet", "stream.arrow", "a.tar"):
        (tmp_path / name).write_bytes(EVERY_KIND[name]())
    corpus = Corpus(data=[str(tmp_path / "*.parquet"), str(tmp_path)], columns={"text": "text"})
    found = [len(source.units()) for source in corpus.sources()]
    assert found == [1, 3]
    assert os.path.exists(files.resolve(str(tmp_path))[0])
