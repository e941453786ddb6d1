"""BLiMP: what is read, what is counted, and the published figures."""

import json
import math
import zipfile
from pathlib import Path

import pytest

from lm.evaluation import blimp
from lm.evaluation.blimp import Pair
from lm.generation.score import Score

DATA = Path(__file__).parents[2] / "shared" / "data" / "text" / "blimp"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there")


class Counter:
    """In place of a scorer: prefers sentences with fewer letters e."""

    def rolling(self, texts, *, report):
        report(len(texts), len(texts))
        return [Score(-float(text.count("e")), len(text), False) for text in texts]


PAIRS = [
    Pair("a1", "agreement", "cat", "tree"),
    Pair("a1", "agreement", "e", "ee"),
    Pair("a1", "agreement", "eee", "e"),
    Pair("a1", "agreement", "e", "e"),
    Pair("a2", "agreement", "x", "e"),
    Pair("i1", "islands", "e", "x"),
]


def test_means_are_over_paradigms_and_ties_are_halves():
    seen = []
    found = blimp.evaluate(Counter(), PAIRS, report=lambda *at: seen.append(at))
    assert found.paradigms == {"a1": 0.625, "a2": 1.0, "i1": 0.0}
    assert found.phenomena == {"agreement": 0.8125, "islands": 0.0}
    assert math.isclose(found.overall, 1.625 / 3)
    assert (found.pairs, seen) == (6, [(12, 12)])
    lines = blimp.table(found, {"other": {"agreement": 0.5, "overall": 0.25}}).splitlines()
    assert [line.split() for line in lines] == [
        ["this", "other"],
        ["agreement", "81.2", "50.0"],
        ["islands", "0.0"],
        ["overall", "54.2", "25.0"],
    ]


def line(paradigm, good, bad):
    values = {"UID": paradigm, "linguistics_term": "t", "sentence_good": good, "sentence_bad": bad}
    return json.dumps(values) + "\n"


def test_a_folder_and_a_zip_file_hold_the_same_pairs(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "b.jsonl").write_text(line("b", "x", "y") + line("b", "z", "w"))
    (folder / "a.jsonl").write_text(line("a", "größer", "grös"))
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"data/{file.name}")
            archive.writestr(f"__MACOSX/data/._{file.name}", b"\xff\x00")
    found = blimp.read(str(folder))
    assert found == blimp.read(str(tmp_path / "b.zip"))
    assert [pair.good for pair in found] == ["größer", "x", "z"]
    assert [pair.good for pair in blimp.read(str(folder), limit=1)] == ["größer", "x"]


@pytest.mark.parametrize("content", ["{}\n", "no json\n", "[1]\n"])
def test_what_is_no_pair_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"holds no \.jsonl"):
        blimp.read(str(tmp_path))
    (tmp_path / "x.jsonl").write_text(line("a", "b", "c") + content)
    with pytest.raises(ValueError, match=r"x.jsonl, line 2: not a pair"):
        blimp.read(str(tmp_path))


@needs_data
def test_the_published_data_and_figures_are_read_whole():
    pairs = blimp.read(str(DATA / "BLiMP.zip"))
    assert len(pairs) == 67_000
    assert len({p.paradigm for p in pairs}) == 67 and len({p.phenomenon for p in pairs}) == 12
    assert sum(p.good == p.bad for p in pairs) == 7  # the data's own slips
    published = blimp.read_published(str(DATA / "models_summary.jsonl"))
    assert list(published) == ["ngram", "lstm", "txl", "gpt2"]
    assert round(published["gpt2"]["overall"], 3) == 0.830
    assert set(published["lstm"]) == {p.phenomenon for p in pairs} | {"overall"}
