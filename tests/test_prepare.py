import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from environment import run_script

from lm.data.tokens import TokenStore
from lm.preparation import parts as parts_module
from lm.preparation import stages as stages_module
from lm.preparation import tokenizer_training
from lm.preparation.corpus import Corpus
from lm.preparation.parts import plan_parts, read_part
from lm.preparation.prepare import begin, prepare, summary
from lm.preparation.stages import stages
from lm.preparation.tokenizer_training import train_tokenizer, training_texts
from lm.sources import Skipped
from lm.storage import lease
from lm.tokenizers.tokenizer import load

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = [sys.executable, str(ROOT / "scripts" / "prepare_data.py")]
REPEATED = "the same text in many places\n"


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """About 5 MB in 300 files, in 5 parts or more: text, duplicates across parts, and bad files."""
    root = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(500)]
    for i in range(300):
        _write(root / f"{i:03d}.txt", " ".join(rng.choice(words, 2500)))
    for i in range(0, 300, 30):
        _write(root / f"{i:03d}_again.txt", REPEATED)
        _write(root / f"{i:03d}_bad.txt", b"\xc3(")
        _write(root / f"{i:03d}_empty.txt", "")
    return root


@pytest.fixture(scope="module")
def model(texts):
    path = texts.parent / "bpe.model"
    train_tokenizer(
        Corpus(data=[str(texts)]),
        out=path,
        vocab_size=1000,
        model_type="bpe",
        piece_span="line",
        split_digits=False,
        sample_bytes=500_000,
    )
    return str(path)


def _words(texts, model, out, *more: str) -> list[str]:
    return ["prepare_data", f"--data={texts}", f"--tokenizer={model}", f"--out={out}", *more]


def _command(texts, model, out, *more: str) -> list[str]:
    return [*SCRIPT, *_words(texts, model, out, *more)[1:]]


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _content(out: Path) -> dict[str, str]:
    """Returns the hash of every file below `out`."""
    return {
        file.relative_to(out).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def prepared(texts, model):
    out = texts.parent / "prepared"
    corpus = Corpus(data=[str(texts)])
    return out, prepare(corpus, tokenizer=model, out=out, num_workers=1)


def test_every_byte_is_a_document_of_a_store_or_a_counted_skip(texts, model, prepared):
    out, result = prepared
    corpus = Corpus(data=[str(texts)])
    parts = plan_parts(corpus.sources())
    assert len(parts) >= 5
    found, skipped = {}, {}
    for split in ("train", "validation"):
        store = TokenStore.open(out / split)
        store.verify()
        tokenizer = store.tokenizer()
        store.check_tokenizer(load(model))
        for i in range(store.num_documents):
            tokens = store.document(i)
            text = tokenizer.decode(tokens)
            assert tokens[-1] == tokenizer.eos_id
            assert store.document_bytes(i) == len(text.encode())
            assert corpus.split_of(store.document_ids(i)) == split
            found[store.document_ids(i)] = text
        for reason, count in store.manifest["skipped"].items():
            skipped[reason] = skipped.get(reason, 0) + count
    expected = {f"{i:03d}.txt": (texts / f"{i:03d}.txt").read_text() for i in range(300)}
    assert found == {**expected, "000_again.txt": REPEATED}
    assert skipped == {"duplicate": 9, "invalid_utf8": 10, "empty": 10}
    assert result.manifests.keys() == {"train", "validation"}
    for manifest in result.manifests.values():
        assert f"{manifest['fields']['text']['num_tokens']:,}" in summary(result.manifests)


def test_stores_are_the_same_for_any_number_of_workers(texts, model, prepared, tmp_path):
    _run(*_command(texts, model, tmp_path / "workers", "--workers=3"))
    expected = _content(prepared[0])
    assert len(expected) == 1 + 2 * 8
    assert _content(tmp_path / "workers") == expected


def test_of_two_at_the_same_time_one_says_so(texts, model, prepared, tmp_path):
    command = _command(texts, model, tmp_path / "out", "--workers=1")
    with lease.lock(str(tmp_path / "out" / "lock")):
        second = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert second.returncode == 1
    assert re.search(rf"out: process {os.getpid()} on .* is preparing it", second.stderr)

    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert 0 in codes
    for code, error in zip(codes, errors, strict=True):  # 0 twice: one began when one had ended
        assert code == 0 or re.search(r"out: process \d+ on .* is preparing it", error)
    assert _content(tmp_path / "out") == _content(prepared[0])


def _complete_stores(out: Path) -> list[str]:
    """Returns the splits that look complete, after checking that they are."""
    splits = [s for s in ("train", "validation") if (out / s / "manifest.json").exists()]
    for split in splits:
        TokenStore.open(out / split).verify()
    return splits


def test_killed_anywhere_and_run_again_gives_the_same_bytes(texts, model, prepared, tmp_path):
    out = tmp_path / "out"
    kills = 0
    written = ["part-*0.json", "part-*3.json", "bucket-*", "split-*/count-*2.json"]
    written += ["split-*/shards.json", "split-*/shard-*0.json"]
    for stage in ["plan.json", *(f"parts-*/{name}" for name in written)]:
        process = subprocess.Popen(
            _command(texts, model, out, "--workers=1"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not list(out.glob(stage)) and process.poll() is None:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert len(_complete_stores(out)) < 2
    assert kills >= 4
    _run(*_command(texts, model, out, "--workers=1"))
    assert _content(out) == _content(prepared[0])


def test_finished_parts_are_kept(texts, model, tmp_path):
    corpus, out = Corpus(data=[str(texts)]), tmp_path / "out"
    job = begin(corpus, tokenizer=model, out=out)
    tokenize, *_ = stages(job)
    half = range(0, job.num_parts, 2)
    for i in half:
        tokenize.run(i)
    before = {file: file.stat().st_mtime_ns for file in out.glob("parts-*/part-*")}
    assert len(before) == 3 * len(half)
    assert tokenize.missing() == [*range(1, job.num_parts, 2)]
    for i in half:
        tokenize.run(i)
    assert before == {file: file.stat().st_mtime_ns for file in out.glob("parts-*/part-*")}


def test_interrupted_run_says_how_to_go_on(texts, model, prepared, tmp_path):
    process = subprocess.Popen(
        _command(texts, model, tmp_path / "out", "--workers=2"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list((tmp_path / "out").glob("parts-*/part-*.json")) and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "interrupted; the same command goes on from here" in errors
    assert "Traceback" not in errors
    _run(*_command(texts, model, tmp_path / "out"))
    assert _content(tmp_path / "out") == _content(prepared[0])


def test_workers_end_with_a_killed_parent(texts, model, tmp_path):
    process = subprocess.Popen(
        _command(texts, model, tmp_path / "out", "--workers=2"), stderr=subprocess.DEVNULL
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = []
    while len(pids) < 3 and process.poll() is None:  # two workers and the resource tracker
        pids = children.read_text().split()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    _wait_for_the_end(pids)


def test_ctrl_c_does_not_wait_for_the_calls_that_workers_are_in():
    code = (
        "import time; from lm.preparation.workers import Workers\n"
        "with Workers(2) as workers: list(workers.run(time.sleep, [600, 601]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(pids := children.read_text().split()) < 3 and process.poll() is None:
        time.sleep(0.01)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and errors.endswith("KeyboardInterrupt\n")
    _wait_for_the_end(pids)


def _wait_for_the_end(pids: list[str]) -> None:
    deadline = time.monotonic() + 20
    while any(_is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived the run"
        time.sleep(0.02)


def _is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_second_run_says_at_once_that_it_is_done(texts, model, prepared):
    before = _content(prepared[0])
    start = time.monotonic()
    assert "were already there" in _run(*_command(texts, model, prepared[0]))
    assert time.monotonic() - start < 10
    assert _content(prepared[0]) == before


def test_a_second_command_that_waited_for_the_first_finds_its_stores(texts, model, tmp_path):
    """It asked whether they are there before the first one ended, and holds the lock after."""
    corpus, out = Corpus(data=[str(texts)]), tmp_path / "out"
    found = prepare(corpus, tokenizer=model, out=out, num_workers=1)
    job = begin(corpus, tokenizer=model, out=out)
    answers = iter([False, True])  # before and under the lock
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(job), "is_complete", lambda _: next(answers, True))
        patch.setattr("lm.preparation.prepare.begin", lambda *_, **__: job)
        again = prepare(corpus, tokenizer=model, out=out, num_workers=1)
    assert again.manifests == found.manifests and not again.was_complete


def test_stores_may_have_the_name_of_data_that_are_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "texts" / "a.txt", "a text " * 40)
    corpus = Corpus(data=["texts/*.txt"], validation_fraction=0)
    for _ in range(2):
        prepare(corpus, tokenizer="bytes", out="texts/stores")
    whole = Corpus(data=["stdlib"])
    (tmp_path / "stdlib").mkdir()
    begin(whole, tokenizer="bytes", out="stdlib")  # the standard library is elsewhere


@pytest.mark.parametrize("out", ["", "stores", "../texts/stores/a"])
def test_stores_in_the_folder_of_their_data_are_refused(tmp_path, out):
    data = tmp_path / "texts"
    _write(data / "a.txt", "a text")
    with pytest.raises(ValueError, match=r"is in the folder of --data=.*would be data, too"):
        prepare(Corpus(data=[f"{data}/"]), tokenizer="bytes", out=data / out)
    assert [path.name for path in data.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokenizer=bytes"], "other tokenizer"),
        (["--validation-fraction=0.2"], "validation_fraction (there 0.05, now 0.2)"),
        (["--data=stdlib"], "num_units (there"),
        (["--separator=x"], "separator"),
        (["--validation-fraction=1"], "must be in [0, 1)"),
        (["--tokenizer=nonsense"], "neither"),
    ],
)
def test_other_inputs_in_the_same_folder_are_refused(texts, model, prepared, flags, message):
    result = run_script(*_words(texts, model, prepared[0], *flags))
    assert result.returncode == 1
    assert result.stderr.startswith("prepare_data: ")
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_changed_file_is_other_input(tmp_path):
    _write(tmp_path / "a.txt", "text")
    corpus = Corpus(data=[str(tmp_path / "a.txt")], validation_fraction=0)
    prepare(corpus, tokenizer="bytes", out=tmp_path / "out")
    _write(tmp_path / "a.txt", "longer text")
    with pytest.raises(ValueError, match=r"num_source_bytes \(there 4, now 11\)"):
        prepare(corpus, tokenizer="bytes", out=tmp_path / "out")


def test_folder_with_a_store_of_unknown_origin_is_left_alone(tmp_path):
    _write(tmp_path / "a.txt", "text")
    _write(tmp_path / "out" / "train" / "something", "precious")
    with pytest.raises(ValueError, match="was not made here"):
        prepare(Corpus(data=[str(tmp_path / "a.txt")]), tokenizer="bytes", out=tmp_path / "out")
    assert _content(tmp_path / "out").keys() == {"train/something"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no documents in .*; skipped: 1 empty"),
        (b"\xff", "no documents in .*; skipped: 1 invalid_utf8"),
        (b"text", "none of the 1 documents .* falls into (train|validation) .*--split=tail"),
    ],
)
def test_split_without_documents_is_an_error_and_leaves_parts_alone(tmp_path, content, message):
    _write(tmp_path / "a.txt", content)
    corpus = Corpus(data=[str(tmp_path / "a.txt")])
    with pytest.raises(ValueError, match=message):
        prepare(corpus, tokenizer="bytes", out=tmp_path / "out")
    left = {file.partition("-")[0] for file in _content(tmp_path / "out")} - {"lock"}
    assert left == ({"parts"} if content == b"text" else set())
    _write(tmp_path / "a.txt", "another text")
    corpus = Corpus(data=[str(tmp_path / "a.txt")], validation_fraction=0)
    assert prepare(corpus, tokenizer="bytes", out=tmp_path / "out").manifests.keys() == {"train"}


def test_parts_survive_a_split_without_documents(tmp_path, monkeypatch):
    """Their ids are of records: only reading them tells that none falls into validation."""
    monkeypatch.setattr(parts_module, "_MIN_PART", 1)
    for i in range(4):
        _write(tmp_path / "texts" / f"{i}.jsonl", json.dumps({"text": f"document {i}"}))
    data, out = [str(tmp_path / "texts")], tmp_path / "out"
    corpus = Corpus(data=data, validation_fraction=1e-9)
    with pytest.raises(ValueError, match=r"none of the 4 documents .* keeps what is done"):
        prepare(corpus, tokenizer="bytes", out=out, num_workers=1)
    parts = {file: file.stat().st_mtime_ns for file in out.glob("parts-*/part-*.json")}
    assert len(parts) == 4 and not (out / "train").exists()
    read = []
    monkeypatch.setattr(stages_module, "read_part", lambda *call: read.append(call))
    corpus = Corpus(data=data, validation_fraction=0.5)
    prepared = prepare(corpus, tokenizer="bytes", out=out, num_workers=1)
    assert not read  # the finished parts were joined
    assert sum(m["num_documents"] for m in prepared.manifests.values()) == 4
    assert not list(out.glob("parts-*"))
    monkeypatch.undo()
    monkeypatch.setattr(parts_module, "_MIN_PART", 1)
    again = tmp_path / "again"
    prepare(Corpus(data=data, validation_fraction=0.5), tokenizer="bytes", out=again, num_workers=1)
    assert _content(again) == _content(out)


def test_an_empty_split_is_an_error_before_anything_is_done(tmp_path, monkeypatch):
    """Ids of whole files are known at the start."""
    monkeypatch.setattr(parts_module, "_MIN_PART", 1)
    for i in range(4):
        _write(tmp_path / "texts" / f"{i}.txt", f"document {i}")
    corpus = Corpus(data=[str(tmp_path / "texts")], validation_fraction=1e-9)
    with pytest.raises(ValueError, match=r"none of the 4 documents .* falls into validation"):
        prepare(corpus, tokenizer="bytes", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lost_records_are_an_error_unless_allowed(tmp_path):
    lines = [{"text": f"good {i}"} for i in range(9)] + [{"body": "x", "title": "y"}]
    _write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    corpus = Corpus(data=[str(tmp_path / "a.jsonl")], validation_fraction=0)
    named = r"1 missing_field \(a\.jsonl@\d+ \(it has body, title\)\)"
    lost = rf"1 of 10 .*10\.0%.*{named}.*--max-loss=0\.1"
    with pytest.raises(ValueError, match=lost):
        prepare(corpus, tokenizer="bytes", out=tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()
    corpus = Corpus(data=corpus.data, validation_fraction=0, max_loss=0.1)
    manifest = prepare(corpus, tokenizer="bytes", out=tmp_path / "out").manifests["train"]
    assert manifest["num_documents"] == 9 and manifest["skipped"] == {"missing_field": 1}


def test_all_that_is_wrong_with_a_corpus_is_said_at_once(tmp_path):
    """Records, bytes and the empty split in one error; a text in Latin-1 names its remedy."""
    texts = tmp_path / "texts"
    _write(texts / "latin.txt", "Käse".encode("latin-1"))
    _write(texts / "a.jsonl", '{"text": "good"}\n{"body": "x"}')
    _write(texts / "b.jsonl.gz", b"no gzip" * 100)
    corpus = Corpus(data=[str(texts)], validation_fraction=1e-9)
    with pytest.raises(ValueError) as error:
        prepare(corpus, tokenizer="bytes", out=tmp_path / "out")
    for part in ("are no documents", "bytes are not read", "falls into validation", "iconv -f"):
        assert part in str(error.value)


def test_files_that_are_not_read_are_counted_and_named(tmp_path):
    for i in range(30):
        _write(tmp_path / "texts" / f"{i}.md", f"text {i}")
    _write(tmp_path / "texts" / "table.xlsx", b"x" * 1000)
    _write(tmp_path / "texts" / ".git" / "config", "x")
    (tmp_path / "texts" / "gone.md").symlink_to("nowhere")
    flags = [str(tmp_path / "texts"), "bytes", tmp_path / "out", "--validation-fraction=0.3"]
    result = run_script(*_words(*flags))
    assert result.returncode == 1 and not (tmp_path / "out").exists()
    assert "files with 83.3% of the bytes are not read: 1 other_file_type" in result.stderr
    assert "(table.xlsx)" in result.stderr and "--max-loss=0.84" in result.stderr
    table = _run(*_command(*flags, "--max-loss=0.9"))
    assert "1 dangling_link, 1 hidden, 1 other_file_type" in table
    for line in ("dangling_link: gone.md", "hidden: .git", "other_file_type: table.xlsx"):
        assert f"  {line}\n" in table


def test_progress_in_a_log_file_is_whole_lines(tmp_path):
    _write(tmp_path / "a.txt", "text")
    flags = ("--validation-fraction=0", "--workers=1")
    command = _command(tmp_path / "a.txt", "bytes", tmp_path / "out", *flags)
    [line] = subprocess.run(command, capture_output=True).stderr.split(b"\n")[:-1]
    assert line.startswith(b"4B of 4B") and b"tokens/s" in line and b"\r" not in line


def test_names_that_are_no_utf8_are_prepared_and_printed(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xe9t\xe9")
    for i in range(40):
        _write(folder / os.fsdecode(b"caf\xe9%d.txt" % i), f"text {i}")
    _write(folder / os.fsdecode(b"\xff.txt"), "")
    out = folder / "stores"
    table = _run(*_command(folder / "*.txt", "bytes", out, "--validation-fraction=0.3"))
    assert r"empty: \xff.txt" in table and r"\xe9t\xe9" in table
    ids = set()
    for split in ("train", "validation"):
        store = TokenStore.open(out / split)
        ids |= {store.document_ids(i) for i in range(store.num_documents)}
    assert ids == {os.fsdecode(b"caf\xe9%d.txt" % i) for i in range(40)}


@pytest.mark.parametrize("name", ["", "file", "file/below"])
def test_out_that_can_be_no_folder_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "a.txt", "text")
    _write(tmp_path / "file", "")
    result = run_script(*_words("a.txt", "bytes", name, "--validation-fraction=0"))
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("prepare_data: ")
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "file"]


def test_documents_of_white_space_are_counted(tmp_path):
    for name, content in (("a.txt", "text"), ("b.txt", " \n\t\u3000"), ("c.txt", "")):
        _write(tmp_path / name, content)
    corpus = Corpus(data=[str(tmp_path / "*.txt")], validation_fraction=0)
    manifest = prepare(corpus, tokenizer="bytes", out=tmp_path / "out").manifests["train"]
    assert manifest["num_documents"] == 1
    assert manifest["skipped"] == {"empty": 1, "white_space": 1}


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("x.model/", "x.model is a folder, not a file"),
        ("", "'' is no path"),
        ("file/x.model", "file"),
    ],
)
def test_a_tokenizer_that_cannot_be_written_is_said_before_training(
    tmp_path, monkeypatch, out, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.model").mkdir()
    _write(tmp_path / "file", "")
    _write(tmp_path / "a.txt", "text " * 1000)
    flags = ["--data=a.txt", "--validation-fraction=0", "--vocab-size=300", f"--out={out}"]
    result = run_script("train_tokenizer", *flags)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and message in result.stderr


def test_tail_split_keeps_the_last_characters_of_each_document(tmp_path):
    text = "".join(chr(0xE0 + i % 20) for i in range(1000))
    _write(tmp_path / "texts" / "a.txt", text)
    corpus = Corpus(data=[str(tmp_path / "texts")], validation_fraction=0.1, split="tail")
    prepare(corpus, tokenizer="bytes", out=tmp_path / "out")
    for split, part in (("train", text[:900]), ("validation", text[900:])):
        store = TokenStore.open(tmp_path / "out" / split)
        assert store.tokenizer().decode(store.tokens(0, store.num_tokens)) == part
        assert store.document_ids(0) == "a.txt"


def test_duplicates_of_a_document_are_found_across_sources_and_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "_MIN_PART", 1)
    for i in range(60):
        _write(tmp_path / "one" / f"{i:02d}.txt", f"text {i % 30}")
        _write(tmp_path / "two" / f"x{i:02d}.txt", f"text {i}")
    corpus = Corpus(data=[str(tmp_path / "one"), str(tmp_path / "two")], validation_fraction=0.3)
    assert len(plan_parts(corpus.sources())) == 120
    prepare(corpus, tokenizer="bytes", out=tmp_path / "out", num_workers=1)
    ids = []
    for split in corpus.splits:
        store = TokenStore.open(tmp_path / "out" / split)
        ids += [store.document_ids(i) for i in range(store.num_documents)]
    assert sorted(ids) == [f"{i:02d}.txt" for i in range(30)] + [f"x{i}.txt" for i in range(30, 60)]


def test_split_depends_on_nothing_but_the_id():
    corpus = Corpus(data=["x"], validation_fraction=0.05)
    ids = [f"file{i}.py" for i in range(20_000)]
    held_out = [i for i in ids if corpus.split_of(i) == "validation"]
    assert len(held_out) / len(ids) == pytest.approx(0.05, abs=0.005)
    more = Corpus(data=["y"], validation_fraction=0.1)
    assert all(more.split_of(i) == "validation" for i in held_out)
    assert [corpus.split_of(i) for i in ("ast.py", "wave.py", "json/decoder.py")] == [
        "train",
        "train",
        "train",
    ]


def test_every_document_is_held_out_in_one_fold():
    ids = [f"file{i}.py" for i in range(5000)]
    folds = [Corpus(data=["x"], fold=(i, 4)) for i in range(4)]
    held = [{i for i in ids if fold.split_of(i) == "validation"} for fold in folds]
    assert sum(map(len, held)) == len(set().union(*held)) == len(ids)
    assert min(map(len, held)) > 0.23 * len(ids)
    for fold in ((4, 4), (-1, 4), (0, 1)):
        with pytest.raises(ValueError, match=f"fold {fold[0]} of {fold[1]}"):
            Corpus(data=["x"], fold=fold)
    with pytest.raises(ValueError, match="folds are of documents"):
        Corpus(data=["x"], fold=(0, 2), split="tail")


def test_folds_are_stores_in_folders_of_their_own(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    out = tmp_path / "out"
    flags = [f"--data={tmp_path}/*.txt", "--tokenizer=bytes", f"--out={out}", "--workers=1"]
    _run(*SCRIPT, *flags, "--folds=2")
    stores = [TokenStore.open(str(out / str(i) / split)) for i in (0, 1)
              for split in ("train", "validation")]  # fmt: skip
    counts = [store.num_documents for store in stores]
    assert counts[0] == counts[3] and counts[1] == counts[2] and sum(counts[:2]) == 40


def test_two_fields_are_prepared_side_by_side(tmp_path):
    lines = [json.dumps({"q": f"question {i}", "a": f"answer {i}"}) for i in range(50)]
    _write(tmp_path / "a.jsonl", "\n".join(lines))
    out = tmp_path / "out"
    flags = ["--field=inputs=q", "--field=targets=a", "--validation-fraction=0.2"]
    table = _run(*_command(tmp_path / "a.jsonl", "bytes", out, *flags))
    assert "train/inputs" in table
    inputs, targets = (TokenStore.open(out / "train", field=f) for f in ("inputs", "targets"))
    decode = inputs.tokenizer().decode
    for i in range(inputs.num_documents):
        question = decode(inputs.document(i))
        answer = decode(targets.document(i))
        assert question.replace("question", "answer") == answer


def test_line_of_100_megabytes_is_prepared_in_bounded_memory(tmp_path):
    line = b"x" * 99 + b" "
    (tmp_path / "a.txt").write_bytes(line * 1_000_000)
    code = (
        "import re, sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        # not ru_maxrss, which a process has from the one that started it
        "finally: print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    )
    flags = ["--split=tail", "--validation-fraction=0.01", "--workers=1"]
    command = _command(tmp_path / "a.txt", "bytes", tmp_path / "out", *flags)
    output = _run(sys.executable, "-c", code, *command[1:])
    assert int(output.splitlines()[-1]) < 2_000_000  # KiB
    store = TokenStore.open(tmp_path / "out" / "train")
    assert store.num_bytes == 99_000_000
    assert store.num_tokens == 99_000_001


def test_tokenizer_is_trained_on_the_train_split_alone(texts):
    corpus = Corpus(data=[str(texts)], validation_fraction=0.3)
    expected = [
        item.fields["text"]
        for part in plan_parts(corpus.sources())
        for item, _ in read_part(corpus, part)
        if not isinstance(item, Skipped) and corpus.split_of(item.id) == "train"
    ]
    trained = list(training_texts(corpus, sample_bytes=10**9))
    assert set(trained) == set(expected)
    assert len(trained) == len(set(trained))
    total = sum(map(len, trained))
    sample = list(training_texts(corpus, sample_bytes=total // 4))
    assert set(sample) < set(trained)
    assert sum(map(len, sample)) == pytest.approx(total // 4, rel=0.4)


def test_a_sample_reads_no_more_than_it_needs_of_a_large_corpus(tmp_path, monkeypatch):
    for i in range(100):
        lines = [json.dumps({"text": f"file {i} record {n} {'x' * 60}"}) for n in range(100)]
        _write(tmp_path / "large" / f"{i:02d}.jsonl", "\n".join(lines))
    monkeypatch.chdir(tmp_path)
    num_read, files = 0, set()

    def counted(corpus, part):
        nonlocal num_read
        for item, digest in read_part(corpus, part):
            num_read += len(item.fields["text"])
            files.add(item.id.partition("@")[0])
            yield item, digest

    monkeypatch.setattr(tokenizer_training, "read_part", counted)
    corpus = Corpus(data=["large"], validation_fraction=0.1)
    sample = list(training_texts(corpus, sample_bytes=10_000))  # of 900,000
    assert sum(map(len, sample)) == pytest.approx(10_000, rel=0.3)
    assert num_read < 90_000 and len(files) >= 16
    for path in (tmp_path / "large").iterdir():
        os.utime(path, (0, 0))  # a copy of the files
    assert sample == list(training_texts(corpus, sample_bytes=10_000))
    assert all("record" in text for text in sample) and len(set(sample)) == len(sample)
    assert len({text.split()[1] for text in sample}) >= 12  # files


def test_train_tokenizer_script_writes_a_model_that_prepares(texts, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "train_tokenizer.py")]
    model = tmp_path / "new" / "x.model"
    first = f"{texts}/00*.txt"
    output = _run(*command, f"--data={first}", f"--out={model}", "--vocab-size=500")
    assert "trained on" in output
    assert os.listdir(model.parent) == ["x.model"]
    _run(*_command(first, model, tmp_path / "out", "--validation-fraction=0.3", "--max-loss=0.1"))
    result = run_script("train_tokenizer", f"--data={first}", f"--out={model}x")
    assert result.returncode == 1
    assert "must end in .model" in result.stderr
