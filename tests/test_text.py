import codecs
import glob
import gzip
import json
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.sources import Document, Skipped, files, text
from lm.sources.file_source import FileSource

TEXT = {"text": "text"}


def _read(spec, columns=TEXT, separator=""):
    source = FileSource(str(spec), columns, separator)
    return [item for unit in source.units() for item in source.read(unit)]


def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_every_file_type_plain_and_compressed_gives_the_same_document(tmp_path):
    content = "line\r\nline äöü\n\ttab\0 "
    for suffix in (".txt", ".md", ".py"):
        file = _write(tmp_path / f"a{suffix}", content)
        _write(tmp_path / f"b{suffix}.gz", gzip.compress(content.encode()))
        _write(tmp_path / f"c{suffix}.zst", zstandard.compress(content.encode()))
        assert _read(file) == [Document(f"a{suffix}", {"text": content})]
    items = _read(tmp_path)
    assert len(items) == 9
    assert {item.fields["text"] for item in items} == {content}


def test_concatenated_compressed_streams_are_read_to_the_end(tmp_path):
    for suffix, compress in ((".gz", gzip.compress), (".zst", zstandard.compress)):
        file = _write(tmp_path / f"a.txt{suffix}", compress(b"one ") + compress(b"two"))
        assert _read(file)[0].fields["text"] == "one two"


def test_ids_are_the_same_wherever_the_folder_lies(tmp_path):
    ids = []
    for root in ("here", "over/there"):
        for name in ("a/x.txt", "a/b/y.md", "z.txt"):
            _write(tmp_path / root / name, name)
        for spec in ("", "**/*.txt", "a/**", "z.txt"):
            ids.append([item.id for item in _read(tmp_path / root / spec)])
    assert ids[:4] == ids[4:]
    assert ids[:4] == [
        ["a/b/y.md", "a/x.txt", "z.txt"],
        ["a/x.txt", "z.txt"],
        ["b/y.md", "x.txt"],
        ["z.txt"],
    ]


def test_folder_counts_files_of_other_types_and_hidden_ones(tmp_path):
    for name in ("a.txt", "b.png", ".git/c.txt", ".d.txt"):
        _write(tmp_path / name, "content")
    hidden = [Skipped(".d.txt", "hidden"), Skipped(".git", "hidden")]
    assert FileSource(str(tmp_path), TEXT).skipped_files() == hidden
    assert _read(tmp_path) == [
        Document("a.txt", {"text": "content"}),
        Skipped("b.png", "other_file_type"),
    ]


def test_records_that_are_no_documents_are_skipped_by_reason(tmp_path):
    lines = [
        b'{"text": "good"}',
        b"",
        b'{"text": ""}',
        b'{"text": "cut',
        b"[" * 100_000,
        b'{"other": "x"}',
        b'"text"',
        b'{"text": 3}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": "last\\nline"}',
    ]
    items = _read(_write(tmp_path / "a.jsonl", b"\n".join(lines)))
    assert [i.reason if isinstance(i, Skipped) else i.fields["text"] for i in items] == [
        "good",
        "empty",
        "empty",
        "malformed_json",
        "malformed_json",
        "missing_field",
        "missing_field",
        "field_is_not_text",
        "invalid_utf8",
        "invalid_utf8",
        "last\nline",
    ]
    assert [item.id for item in items[:3]] == ["a.jsonl@0", "a.jsonl@17", "a.jsonl@18"]
    assert items[7].detail == "text is of type int, no text"


def test_files_that_are_no_documents_are_skipped_by_reason(tmp_path):
    assert _read(_write(tmp_path / "a.txt", b"\xff")) == [Skipped("a.txt", "invalid_utf8")]
    for name in ("e.txt", "e.jsonl", "e.txt.gz", "e.jsonl.gz"):
        content = gzip.compress(b"") if name.endswith("gz") else b""
        assert _read(_write(tmp_path / name, content)) == [Skipped(name, "empty")]


def test_two_fields_come_from_their_columns(tmp_path):
    line = json.dumps({"question": "q", "answer": "a", "other": 1})
    file = _write(tmp_path / "a.jsonl", line + "\n")
    columns = {"inputs": "question", "targets": "answer"}
    assert _read(file, columns) == [Document("a.jsonl@0", {"inputs": "q", "targets": "a"})]
    with pytest.raises(ValueError, match=r"a\.txt: a \.txt file has only the field text"):
        _read(_write(tmp_path / "a.txt", "x"), columns)


@pytest.mark.parametrize("separator", ["\n\n", "<|endoftext|>", "\n"])
@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_separator_makes_several_documents_of_a_file(tmp_path, monkeypatch, separator, block):
    monkeypatch.setattr(files, "BLOCK", block)
    file = _write(tmp_path / "a.txt", separator.join(["one", "two äö", " ", "three"]) + separator)
    items = _read(file, separator=separator)
    assert [i.reason if isinstance(i, Skipped) else i.fields["text"] for i in items] == [
        "one",
        "two äö",
        "empty",
        "three",
    ]
    assert items[1].id == f"a.txt@{3 + len(separator)}"


@settings(deadline=None, max_examples=100)
@given(
    lines=st.lists(st.text(alphabet="ab\u00e9", max_size=12), max_size=20),
    step=st.integers(1, 40),
    block=st.integers(1, 20),
)
def test_ranges_of_a_file_hold_each_record_once(tmp_path_factory, lines, step, block):
    file = tmp_path_factory.mktemp("ranges") / "a.jsonl"
    content = "\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines)
    file.write_text(content)
    whole = _read(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_RANGE", step)
        patch.setattr(files, "BLOCK", block)
        ranged = _read(file)
    assert whole == ranged
    assert len(whole) == max(len(lines), 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("absent.txt", "no such file"),
        ("*.txt", "no file matches"),
        ("absent/**", "no file matches"),
        ("empty", "no files"),
        ("pictures", "no files"),
        ("pictures/a.png", "unknown file type"),
        ("pictures/*", "unknown file type"),
    ],
)
def test_missing_empty_and_unknown_data_are_errors(tmp_path, spec, message):
    (tmp_path / "empty").mkdir()
    _write(tmp_path / "pictures" / "a.png", "x")
    with pytest.raises(ValueError, match=message):
        FileSource(str(tmp_path / spec), TEXT).units()


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.txt.zst"])
def test_a_damaged_compressed_file_is_skipped_by_name(tmp_path, name):
    zst = zstandard.ZstdCompressor(write_checksum=True)  # as the zstd command does
    compress = gzip.compress if name.endswith("gz") else zst.compress
    content = compress(bytes(range(256)) * 100)
    for damaged in (content[:-20], content[:40] + b"?" * 8 + content[48:], b"no such format"):
        file = _write(tmp_path / name, damaged)
        *documents, last = _read(file)
        assert (last.id, last.reason) == (name, "damaged_file") and last.detail
        assert not documents or "jsonl" in name


def test_file_changed_after_planning_is_an_error(tmp_path):
    file = _write(tmp_path / "a.txt", "before")
    source = FileSource(str(file), TEXT)
    (unit,) = source.units()
    _write(file, "afterwards")
    with pytest.raises(ValueError, match="was changed"):
        list(source.read(unit))


def test_stdlib_is_source_without_tests_and_installed_packages():
    source = FileSource("stdlib", TEXT)
    units = source.units()
    names = {unit.name for unit in units}
    assert {"argparse.py", "asyncio/events.py"} <= names
    folders = {folder for name in names for folder in Path(name).parts[:-1]}
    assert not folders & {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    assert 5e6 < sum(unit.size for unit in units) < 20e6
    everything = {unit.name for unit in FileSource("stdlib:all", TEXT).units()}
    assert names < everything
    document = next(i for u in units if u.name == "argparse.py" for i in source.read(u))
    file = Path(sysconfig.get_path("stdlib"), "argparse.py")
    assert document == Document("argparse.py", {"text": file.read_bytes().decode()})


def test_tables_have_their_columns_by_number(tmp_path):
    content = "Hi.\t嗨。\tby someone\r\n\nNo.\t\nonly one\nBye.\t再见。\n"
    columns = {"source": "1", "target": "2"}
    expected = [
        Document("a.tsv@0", {"source": "Hi.", "target": "嗨。"}),
        Skipped("a.tsv@23", "empty"),
        Skipped("a.tsv@24", "empty"),
        Skipped("a.tsv@29", "missing_field", ("1",)),
        Document("a.tsv@38", {"source": "Bye.", "target": "再见。"}),
    ]
    assert _read(_write(tmp_path / "a.tsv", content), columns) == expected
    text_file = _read(_write(tmp_path / "a.txt", content), columns)
    assert [item[1] for item in text_file] == [item[1] for item in expected]
    compressed = _write(tmp_path / "a.tsv.gz", gzip.compress(content.encode()))
    assert [item[1] for item in _read(compressed, columns)] == [item[1] for item in expected]


def test_a_template_puts_columns_into_text(tmp_path):
    record = {"question": "why {answer}?", "context": "because", "answer": "so"}
    file = _write(tmp_path / "a.jsonl", json.dumps(record))
    columns = {"source": "question: {question} context: {context}\n", "target": "answer"}
    [document] = _read(file, columns)
    assert document.fields == {
        "source": "question: why {answer}? context: because\n",
        "target": "so",
    }
    assert _read(file, {"source": "{question} {title}"}) == [
        Skipped("a.jsonl@0", "missing_field", ("question", "context", "answer"))
    ]


def test_several_fields_of_a_text_are_refused_unless_they_are_numbers(tmp_path):
    file = _write(tmp_path / "a.txt", "a\tb")
    with pytest.raises(ValueError, match="by their numbers"):
        _read(file, {"source": "en", "target": "zh"})


def test_odd_entries_of_a_folder_are_counted_and_the_rest_is_read(tmp_path):
    root = tmp_path / "texts"
    for name in ("a.txt", "sub/b.txt", "z/c.txt"):
        _write(root / name, name)
    _write(tmp_path / "outside" / "d.txt", "d")
    (root / "gone.txt").symlink_to("nowhere")
    (root / "itself.txt").symlink_to("itself.txt")
    (root / "loop").symlink_to(".")
    (root / "sub" / "up").symlink_to("..")
    (root / "again").symlink_to("z")
    (root / "linked").symlink_to(tmp_path / "outside")
    os.mkfifo(root / "pipe.txt")
    for spec in (root, root / "**" / "*.txt"):
        source = FileSource(str(spec), TEXT)
        documents = [item.id for unit in source.units() for item in source.read(unit)]
        assert documents == ["a.txt", "linked/d.txt", "sub/b.txt", "z/c.txt"]
        reasons = {item.id: item.reason for item in source.skipped_files()}
        files_passed = {
            "gone.txt": "dangling_link",
            "itself.txt": "link_loop",
            "pipe.txt": "not_a_file",
        }
        assert files_passed.items() <= reasons.items()
        folders = {"loop", "sub/up", "again"} if spec == root else set()
        assert {n for n, r in reasons.items() if r == "folder_seen_before"} == folders


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become a user who may not read")
def test_unreadable_files_and_folders_are_counted():
    root = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folders are root's alone
    try:
        for name in ("a.txt", "closed/b.txt", "secret.txt"):
            _write(root / name, name)
        root.chmod(0o755)
        (root / "closed").chmod(0)
        (root / "secret.txt").chmod(0)
        os.seteuid(65534)
        source = FileSource(str(root), TEXT)
        items = [item for unit in source.units() for item in source.read(unit)]
        assert items == [
            Document("a.txt", {"text": "a.txt"}),
            Skipped("secret.txt", "unreadable", detail="Permission denied"),
        ]
        assert source.skipped_files() == [Skipped("closed", "unreadable")]
    finally:
        os.seteuid(0)
        shutil.rmtree(root)


def test_patterns_match_as_glob_does(tmp_path):
    for name in ("a.txt", "b/c.txt", "b/d/e.txt", ".h/f.txt", "b/.g.txt", "b/x.md"):
        _write(tmp_path / name, name)
    for pattern in ("*.txt", "**/*.txt", "b/**/*.txt", "**/d/*", "b/**", "*/*.txt", "**/.*.txt"):
        expected = {
            os.path.relpath(path, tmp_path)
            for path in glob.glob(str(tmp_path / pattern), recursive=True)
            if os.path.isfile(path)
        }
        listing = files.find(str(tmp_path / pattern))
        assert {os.path.relpath(file.path, tmp_path) for file in listing.files} == expected


@pytest.mark.parametrize("name", ["my texts", "[1999]", "a*b", "%41", "what?", "{0}", "~x", "a\nb"])
def test_folders_and_files_of_any_name_are_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / name / name / f"{name}.txt", "content")
    for spec in (name, f"{name}/{name}/{name}.txt", f"{name}/{name}/*.txt", f"{name}/**/*.txt"):
        [document] = _read(spec)
        assert document.id.endswith(f"{name}.txt") and document.fields == {"text": "content"}


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _write(tmp_path / "a.txt", "content")
    assert _read("~/a.txt") == _read("~/*.txt") == [Document("a.txt", {"text": "content"})]


def test_zstandard_frames_with_long_windows_are_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=30, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = compressor.compress(b"text ") + compressor.flush()  # its size is not written
    file = _write(tmp_path / "a.txt.zst", content)
    assert zstandard.get_frame_parameters(content).window_size == 1 << 30
    assert _read(file) == [Document("a.txt.zst", {"text": "text "})]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 1 << 20])
def test_a_separator_of_lines_is_found_where_lines_end_in_crlf(tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "BLOCK", block)
    file = _write(tmp_path / "a.txt", "one\r\n\r\ntwo\r\nlines\r\n\nthree\n\nfour\r\n")
    for separator in ("\n\n", "\r\n\r\n"):
        texts = [item.fields["text"] for item in _read(file, separator=separator)]
        assert texts == ["one", "two\r\nlines", "three", "four"]
    assert _read(file, separator="\n\n")[1].id == "a.txt@7"


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark = codecs.BOM_UTF8
    assert _read(_write(tmp_path / "a.txt", mark + b"text")) == [
        Document("a.txt", {"text": "text"})
    ]
    [document] = _read(_write(tmp_path / "a.jsonl", mark + b'{"text": "x"}\n'))
    assert document == Document("a.jsonl@0", {"text": "x"})
    [document] = _read(_write(tmp_path / "a.tsv", mark + b"x\ty"), {"text": "1"})
    assert document.fields == {"text": "x"}
    [document, _] = _read(_write(tmp_path / "b.txt", mark + b"one\n\ntwo"), separator="\n\n")
    assert document == Document("b.txt@0", {"text": "one"})
    inside = f"a{mark.decode()}b"  # not at the beginning: a character of the text
    assert _read(_write(tmp_path / "c.txt", inside))[0].fields == {"text": inside}
    for name in ("u.txt", "u.jsonl"):
        utf_16 = _write(tmp_path / name, '{"text": "x"}\n'.encode("utf-16"))
        assert _read(utf_16) == [Skipped(name, "utf_16")]


def test_lines_of_json_end_at_newlines_alone(tmp_path):
    texts = [f"one{separator}document" for separator in "\u2028\u2029\x85\x0b\x0c\x1e"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file = _write(tmp_path / "a.jsonl", "\r\n".join(lines))
    assert [item.fields["text"] for item in _read(file)] == texts


def test_an_integer_too_long_to_read_is_one_record(tmp_path):
    file = _write(tmp_path / "a.jsonl", '{"text": "x", "n": ' + "9" * 5000 + '}\n{"text": "y"}')
    assert [getattr(item, "reason", "document") for item in _read(file)] == [
        "malformed_json",
        "document",
    ]
