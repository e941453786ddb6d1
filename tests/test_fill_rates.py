"""The command that measures how full rows are."""

import re
import sys

import numpy as np

from lm.preparation.token_writer import write_store
from lm.sources import Document
from lm.tokenizers.tokenizer import ByteTokenizer
from scripts import fill_rates


def test_every_objective_is_measured_on_all_rows(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    texts = ["word " * int(n) for n in rng.integers(2, 12, 300)]
    documents = [Document(str(i), {"text": text}) for i, text in enumerate(texts)]
    write_store(tmp_path / "text", documents, ByteTokenizer())
    targets = {"pairs": [text[: len(text) // 3] for text in texts], "labels": ["a", "b"] * 150}
    for name, values in targets.items():
        documents = [
            Document(str(i), {"source": source, "target": target})
            for i, (source, target) in enumerate(zip(texts, values, strict=True))
        ]
        write_store(tmp_path / name, documents, ByteTokenizer(), fields=("source", "target"))
    flags = [f"--{name}={tmp_path / name}" for name in ("text", "pairs", "labels")]
    monkeypatch.setattr(sys, "argv", ["fill_rates.py", *flags, "--length=128"])
    fill_rates.main()
    _, *lines = capsys.readouterr().out.splitlines()
    fills = {}
    for line in lines:
        name, kind, lengths = re.split(r"\s{2,}", line)[:3]
        fills[name, kind, lengths] = [float(x) for x in re.findall(r"([\d.]+)%", line)]
    names = ("causal", "prefix", "mlm", "span_corruption", "ul2", "denoising")
    assert {name for name, *_ in fills} == {*names, "seq2seq", "classification"}
    assert fills["causal", "decoder", "128"][0] > 99
    assert fills["ul2", "decoder", "128"][0] > 97
    both = "encoder and decoder"
    assert min(fills["span_corruption", both, "128, 29"]) > 97
    wasteful, *fitting = (x for (n, k, _), x in fills.items() if (n, k) == ("seq2seq", both))
    assert wasteful[0] < 50 and min(fitting[0]) > 85
