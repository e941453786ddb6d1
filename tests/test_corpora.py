"""Filters, near-duplicates and engines in a preparation: bytes of the stores, counts, reports."""

import contextlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import object_stores
import pytest

from lm.data.tokens import TokenStore
from lm.preparation import engines
from lm.preparation.corpus import Corpus
from lm.preparation.prepare import prepare, summary
from lm.storage import files as storage
from tests.test_filters import GERMAN, GOOD, near_duplicate
from tests.test_slurm import no_slurm

PERSON = "Write to jane.doe@corp.com or call (212) 736-5000; the host is 93.184.216.34."
FLAGS = ["language keep=en min_probability=0.5", "pii"]


def write_jsonl(file, texts):
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def prose(rng, count=60):
    words = f"{GOOD} {GOOD.lower()}".split()
    return " ".join(rng.choices(words, k=count)).capitalize() + "."


def texts_of(out):
    store = TokenStore.open(out / "train")
    decode = store.tokenizer().decode
    return [decode(store.document(i)[:-1].tolist()) for i in range(store.num_documents)]


def files_of(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(Path(out).rglob("*"))
        if path.is_file()
    }


def test_what_filters_drop_and_mask_is_counted_and_reported(tmp_path):
    rng = random.Random(0)
    kept = [prose(rng) for _ in range(8)]
    item = " ".join(GOOD.split()[:30])
    texts = [*kept, GERMAN, f"{kept[0]} {PERSON}", f"Before it. {item} After it.", kept[1]]
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    evals = write_jsonl(tmp_path / "evals.jsonl", [item])
    corpus = Corpus((data,), validation_fraction=0, filters=[*FLAGS, f"decontaminate data={evals}"])
    out = tmp_path / "out"
    made = prepare(corpus, tokenizer="bytes", out=out, num_workers=1).manifests["train"]
    assert made["num_documents"] == 9
    assert made["skipped"] == {"language/de": 1, f"decontaminate/{evals}": 1, "duplicate": 1}
    assert made["masked"] == {"email": 1, "ip": 1, "phone": 1}
    assert "masked: 1 email, 1 ip, 1 phone" in summary({"train": made})
    [report] = out.glob("contaminated-*/*.jsonl")
    [line] = [json.loads(line) for line in report.read_text().splitlines()]
    assert line["id"].startswith("a.jsonl@") and line["set"] == evals
    assert line["match"].startswith("13-gram ") and "at word 2 of text" in line["match"]
    [masked] = [text for text in texts_of(out) if "host" in text]
    assert masked == f"{kept[0]} Write to <EMAIL> or call <PHONE>; the host is <IP>."
    everything = b"".join(files_of(out).values()).replace(b"\0", b"")  # tokens of two bytes, too
    assert b"corp.com" not in everything and b"736-5000" not in everything


def test_other_filters_are_another_preparation(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [prose(random.Random(i)) for i in range(5)])
    plain = Corpus((data,), validation_fraction=0)
    out = tmp_path / "out"
    prepare(plain, tokenizer="bytes", out=out, num_workers=1)
    changes: list[dict[str, Any]] = [{"filters": ["pii"]}, {"near_duplicates": ""}]
    for changed in changes:
        corpus = Corpus((data,), validation_fraction=0, **changed)
        with pytest.raises(ValueError, match=f"other inputs: .*{next(iter(changed))}"):
            prepare(corpus, tokenizer="bytes", out=out, num_workers=1)
    with pytest.raises(ValueError, match=r"--near-duplicates: 'band' is no parameter"):
        prepare(
            Corpus((data,), near_duplicates="band=3"), tokenizer="bytes", out=tmp_path / "other"
        )


def planted(count, *, seed=0, length=120):
    """Return texts, a fifth of them near-duplicates of an earlier one at a similarity of 0.8 or
    more, and the numbers of those.
    """
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklm", k=rng.randint(2, 8))) for _ in range(3000)]
    texts, copies = [], []
    for i in range(count):
        if i > 10 and i % 5 == 0:
            original = rng.choice(texts[:10] + texts[-9:])
            texts.append(near_duplicate(original, 0.8, rng, words)[0])
            copies.append(i)
        else:
            texts.append(rng.choices(words, k=length))
    return [" ".join(text) for text in texts], copies


def test_near_duplicates_are_dropped_wherever_they_are_divided(tmp_path):
    texts, copies = planted(150)
    kept, stores = set(), []
    for name, size in (("one", 150), ("many", 17)):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(0, len(texts), size):
            write_jsonl(folder / f"{i:04d}.jsonl", texts[i : i + size])
        corpus = Corpus((str(folder),), validation_fraction=0, near_duplicates="")
        out = tmp_path / f"store-{name}"
        made = prepare(corpus, tokenizer="bytes", out=out, num_workers=1).manifests["train"]
        kept = {*texts_of(out)}
        stores.append(kept)
        assert made["skipped"] == {"near_duplicate": len(texts) - len(kept)}
    assert stores[0] == stores[1]
    dropped = {i for i, text in enumerate(texts) if text not in kept}
    assert len(dropped & {*copies}) >= 0.95 * len(copies)  # recall
    assert len(dropped - {*copies}) <= 1  # precision


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Return a function that shows that an engine makes the bytes which this process makes."""
    monkeypatch.setattr("lm.preparation.parts._MIN_PART", 4000)  # else one part
    ran, run = [], engines.Engine.run
    spy = lambda self, task, calls: ran.append(len(calls)) or run(self, task, calls)  # noqa: E731
    monkeypatch.setattr(engines.Engine, "run", spy)

    def check(engine, filters, texts):
        for i in range(6):
            write_jsonl(tmp_path / f"{i}.jsonl", texts[i::6])
        data, made = [str(tmp_path / f"{i}.jsonl") for i in range(6)], []
        runs: list[tuple[str, dict[str, Any]]] = [
            ("here", {"num_workers": 1}),
            ("there", {"engine": engine}),
        ]
        for name, options in runs:
            corpus = Corpus(data, filters=filters, near_duplicates="")
            prepare(corpus, tokenizer="bytes", out=tmp_path / name, **options)
            made.append(files_of(tmp_path / name))
        assert made[0] == made[1]
        assert sum(number > 1 for number in ran) == 4  # tokenize, count, write, complete

    return check


@pytest.mark.slow
def test_datatrove_makes_the_same_bytes_on_this_machine(compare):
    compare("local workers=2", ["pii kinds=email"], planted(60)[0])


@pytest.mark.slow
def test_an_engine_writes_stores_and_reports_to_a_bucket(tmp_path, monkeypatch):
    monkeypatch.setattr("lm.preparation.parts._MIN_PART", 4000)
    texts = planted(60)[0]
    data = [write_jsonl(tmp_path / f"{i}.jsonl", texts[i::6]) for i in range(6)]
    evals = write_jsonl(tmp_path / "evals.jsonl", texts[3:5])
    corpus = Corpus(data, filters=[f"decontaminate data={evals}"], near_duplicates="")
    found = []
    with object_stores.in_this_process():
        for out in (str(tmp_path / "out"), "gs://bucket1/out", "s3://bucket1/out"):
            # spawn: a fork server has the environment of the test that has started it
            engine = "local workers=2 start_method=spawn" if "://" in out else None
            manifests = prepare(corpus, tokenizer="bytes", out=out, engine=engine).manifests
            [folder] = [name for name in storage.list_names(out) if name.startswith("contaminated")]
            files = [f"{out}/{folder}/{name}" for name in storage.list_names(f"{out}/{folder}")]
            reports = [storage.read_bytes(file) for file in files]
            found.append(({k: v["content_hash"] for k, v in manifests.items()}, reports))
    assert found[0] == found[1] == found[2] and len(found[0][1]) == 2


@pytest.mark.slurm
@pytest.mark.skipif(bool(no_slurm()), reason=no_slurm())
def test_slurm_makes_the_same_bytes(compare):
    options = "partition=test time=0:10:00 mem_per_cpu_gb=1"
    compare(f"slurm {options}", ["pii kinds=email"], planted(60)[0])


SLOW_FILTER = """
import time


def build(*, seconds: float = 0.1):
    def keep(document):
        time.sleep(seconds)
        return document
    return keep
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray isn't installed")
def test_ray_makes_the_same_bytes_with_a_node_that_is_killed(compare, tmp_path, monkeypatch):
    (tmp_path / "modules" / "asleep").mkdir(parents=True)
    (tmp_path / "modules" / "asleep" / "filter.py").write_text(SLOW_FILTER)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    path = os.pathsep.join(
        [str(tmp_path / "modules"), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    )
    monkeypatch.setenv("PYTHONPATH", path)  # of the nodes
    host = socket.gethostbyname(socket.gethostname())
    address = f"{host}:{free_port()}"
    head = ("--head", f"--port={address.split(':')[1]}")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,  # short, for sockets
        ray_node(folder, *head, host=host),
        ray_node(folder, f"--address={address}", host=host) as second,
    ):
        threading.Thread(
            target=kill_at_work, args=(second, tmp_path / "there"), daemon=True
        ).start()
        compare(f"ray address={address} memory_gb=0.1", ["asleep.filter"], planted(90)[0])
        assert second.poll() == -signal.SIGKILL, "the work has ended before the node"


def kill_at_work(node, out):
    while not list(out.glob("parts-*/part-*.json")):
        time.sleep(0.05)
    os.killpg(node.pid, signal.SIGKILL)


def free_port():
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def ray_node(folder, *flags, host):
    """A node of one CPU, in a process group of its own."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
    options = [f"--node-ip-address={host}", "--disable-usage-stats"]
    if "--head" in flags:
        options += ["--include-dashboard=false", f"--temp-dir={folder}"]
    with subprocess.Popen(
        [*command, *options, *flags], start_new_session=True, stdout=subprocess.PIPE, text=True
    ) as node:
        try:
            assert node.stdout is not None
            for line in node.stdout:
                if "runtime started" in line:
                    break
            yield node
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "engine, error",
    [
        ("slrum", "is no engine; there are: local, slurm, ray; did you mean slurm"),
        ("slurm", r"time=\.\.\., partition=\.\.\. must be given"),
        ("local workers=many", "workers=many is no int such as -1"),
        ("local tasks=3", "'tasks' is no parameter"),
    ],
)
def test_a_wrong_engine_is_one_line_that_names_it(engine, error):
    with pytest.raises(ValueError, match=error) as raised:
        engines.parse(engine)
    assert "\n" not in str(raised.value) and "--engine" in str(raised.value)
