"""`make pretrain` on a text of one's own: the commonest kinds of text, and what the end needs."""

import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from environment import fake_devices, run_script

from lm.preparation.corpus import Corpus
from lm.preparation.parts import choose_split
from lm.preparation.tokenizer_training import train_sentencepiece, training_texts
from lm.tokenizers.tokenizer import from_bytes
from scripts import pretrain as script

ROOT = Path(__file__).parents[1]
SMALL = {
    "train.num_steps": 2,
    "train.eval_every": 0,
    "checkpoint.every": 0,
    "optimizer.schedule.warmup_steps": 1,
    "data.batch_size": 2,
    "data.length": 32,
    "model.num_layers": 1,
    "model.embed_dim": 32,
    "model.max_length": 32,  # shorter than a sample is elsewhere
    "model.vocab_size": 600,
}


def settings(**changes):
    return [f"--config.{key}={value}" for key, value in {**SMALL, **changes}.items()]


def chinese(num_characters):
    """Lines of text with more characters than the vocabulary of `SMALL` has pieces."""
    common = "的一是不了人我在有他这中大来上国" * 40
    text = "".join(chr(0x4E00 + i * 7 % 2000) + common[i % 600] for i in range(num_characters // 2))
    return "\n".join(text[i : i + 40] for i in range(0, len(text), 40))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.schedule.warmup_steps": 9}, r"warmup_steps \(9\) and decay need"),
        ({"data.batch_size": 3}, r"config.data.batch_size \(3\) must be divisible"),
        ({"train.num_tokens": 9}, "set one of config.train.num_steps"),
    ],
)
def test_a_wrong_config_is_refused_before_the_data_are_read(
    tmp_path, monkeypatch, changes, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    changes = {"data.batch_size": 8, **changes}
    done = run_script("pretrain", "--data=a.txt", *settings(**changes))
    assert done.returncode and re.search(message, done.stderr) and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.slow
def test_one_chinese_file_with_short_rows_trains_to_the_end_and_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "红楼 梦.txt").write_text(chinese(12_000), encoding="utf-8")
    flags = ["--data=红楼 梦.txt", "--workdir=runs/my run", *settings()]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "pretrain.py"), *flags],
        env=fake_devices(1),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "the last 5% of each are held out" in done.stdout
    [store] = (tmp_path / "data").iterdir()
    assert store.name.startswith("红楼-梦-")
    assert "--data=红楼 梦.txt'" in done.stdout.split("What next:")[1]
    assert "it has one with --config.model.activation=swiglu" in done.stdout
    samples = (tmp_path / "runs/my run/samples.txt").read_text(encoding="utf-8")
    assert samples.count("--- sample") == 2 and "def " not in samples
    assert (tmp_path / "runs/my run/report.html").exists()
    summary = json.loads((tmp_path / "runs/my run/summary.json").read_text())
    assert 0 < summary["bits_per_byte"] < 8 and summary["steps"] == 2
    # zlib and zlib-ng compress to other sizes
    gzip = f"(gzip -9 {summary['gzip_bits_per_byte']:.3f} by zlib {zlib.ZLIB_RUNTIME_VERSION}, "
    assert gzip in done.stdout

    flags = ["--data=红楼 梦.txt", "--workdir=runs/b"]
    eight = {"data.batch_size": 8}  # rows, for the devices of this process
    other = run_script("pretrain", *flags, *settings(**eight, **{"model.vocab_size": 512}))
    assert other.returncode == 1
    assert other.stderr.startswith(f"error: data/{store.name}/tokenizer.model has 600 pieces and ")
    assert f"--stores=data/{store.name}-512" in other.stderr and other.stderr.count("\n") == 1
    long = run_script("pretrain", *flags, "--prompt=" + "的" * 99, *settings(**eight))
    assert long.returncode == 1 and "config.model.max_length (32) must be larger" in long.stderr
    assert not (tmp_path / "runs/b").exists()


def test_a_tokenizer_follows_the_text_until_a_store_is_begun(tmp_path):
    text, file = tmp_path / "a.txt", tmp_path / "stores" / "tokenizer.model"
    corpus = Corpus([str(text)], split="tail")
    text.write_text("the cat sat on the mat\n" * 9)
    first = script.make_tokenizer(corpus, file, 280).model
    assert script.make_tokenizer(corpus, file, 280).model == first
    text.write_text("ein Hund lief um das Haus\n" * 9)
    second = script.make_tokenizer(corpus, file, 280).model
    assert second != first
    (tmp_path / "stores" / "plan.json").write_text("{}")  # whose own check is against the text
    text.write_text("un chien court\n" * 30)
    assert script.make_tokenizer(corpus, file, 280).model == second


def test_a_store_without_the_field_that_is_read_is_refused():
    script.check_field([])
    script.check_field(["text=body"])
    with pytest.raises(ValueError, match=r"field text: say --field=text=question$"):
        script.check_field(["question"])
    with pytest.raises(ValueError, match=r"field text: say --field=text=b$"):
        script.check_field(["a=b"])


def test_records_without_the_field_name_those_that_are_there(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"title": "a", "body": "b"}\n' * 3)
    message = r"3 missing_field. Records have the fields title, body and not text: say --field=text"
    with pytest.raises(ValueError, match=message):
        list(training_texts(Corpus([str(tmp_path / "a.jsonl")]), sample_bytes=100))


@pytest.mark.parametrize(("count", "expected"), [(1, "tail"), (99, "tail"), (100, "hash")])
def test_few_documents_are_held_out_in_part(tmp_path, count, expected):
    for i in range(count):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    assert choose_split(Corpus([str(tmp_path)])).split == expected
    whole = Corpus([str(tmp_path)], validation_fraction=0.0)
    assert choose_split(whole) == whole


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (["texts/chinese-novels/hongloumeng.txt"], "hongloumeng"),
        (["books/红楼梦.txt.gz"], "红楼梦"),
        (["books/**/*.txt"], "books"),
        (["a/web pages/"], "web-pages"),
        (["tfds:lm1b/plain"], "plain"),
        (["stdlib:all", "b/c.md"], "stdlib-all-c"),
    ],
)
def test_a_store_is_named_like_its_data(data, name):
    found = script.corpus_name(Corpus(data))
    assert found.rpartition("-")[0] == name and found != script.corpus_name(Corpus([*data, "x"]))


def test_prompts_are_beginnings_of_lines_of_the_held_out_text():
    text = "\n".join(f"line number {i} is here, and goes on for long" for i in range(30))
    tokenizer = from_bytes("bytes", b"")
    prompts = script.make_prompts(text.encode(), tokenizer, 256)
    assert prompts == ["line number 10 is here,", "line number 20 is here,"]
    assert script.make_prompts(("春" * 50).encode(), tokenizer, 256) == ["春" * 16]
    assert script.make_prompts(("春" * 50).encode(), tokenizer, 32) == ["春" * 5]
    assert script.make_prompts(b"a\nb", tokenizer, 256) == ["a", "b"]
    assert script.make_prompts(b"", tokenizer, 256) == []


def test_a_prompt_that_leaves_no_room_is_refused_before_training():
    tokenizer = from_bytes("a.model", train_sentencepiece(["a b c"], vocab_size=269))
    script.check_prompts(["a b c"], tokenizer, 8)
    with pytest.raises(ValueError, match=r"has 10 tokens .* config.model.max_length \(8\) must be"):
        script.check_prompts(["x" * 9], tokenizer, 8)


def test_of_a_repeated_setting_the_next_command_keeps_the_last():
    given = ["--config.a=1", "--data=x", "--workdir=r", "--data=y", "-config.a=2", "--config.b=1"]
    found = script.repeat_with([*given, "--workdir", "s", "--data=stdlib"], "t", "a=3")
    assert found == ["--data=x", "--data=y", "--workdir=t", "--config.a=3", "--config.b=1"]
