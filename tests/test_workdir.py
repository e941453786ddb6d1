"""A run's folder: any legal name works or is refused in one line, and it may be moved."""

import argparse
import os

import pytest

from lm import cli
from lm.config import conversion
from lm.exit_codes import Exit
from lm.preparation.tokenizer_training import train_words
from lm.training import compatibility
from lm.training.loop import train
from lm.training.stored_run import load

NAMES = ["my run", "100%d {x} %s", "a?b#c&d=e", "[x]*", 'it\'s "q"', "$HOME `x`", "运行", "-x"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_folder_stays_as_it_is(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert cli.folder(name) == name
    os.mkdir(name)
    assert cli.folder(name) == name
    assert cli.folder(f"{name}/new/deeper") == f"{name}/new/deeper"


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for kind in (cli.folder, cli.file, cli.local_path):
        assert kind("~/runs/a") == str(tmp_path / "runs" / "a")


def test_what_is_written_here_alone_is_in_no_bucket():
    assert cli.file("gs://bucket/plan.json") == "gs://bucket/plan.json"
    for path in ("gs://bucket/plan.json", "s3:/bucket/plan.json", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=r"in a bucket|no bucket's|no path"):
            cli.local_path(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "'' is no name of a folder"),
        (" ", "' ' is no name of a folder"),
        ("file", "file is a file, not a folder"),
        ("file/below", "file is a file, not a folder"),
        ("link", "link is a link to gone: not there"),
        ("link/below", "link is a link to gone: not there"),
        (os.fsdecode(b"\xff\xfe"), r"b'\\xff\\xfe' is not UTF-8"),
    ],
)
def test_what_can_be_no_folder_is_refused_with_its_name(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        cli.folder(name)


@pytest.fixture
def words(tmp_path):
    """The path of a tokenizer.json of a few words, with a chat template beside it."""
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "words.json").write_bytes(train_words(["a b c d\ne f"], vocab_size=8))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder / "words.json"


def test_a_run_that_was_moved_has_its_tokenizer(tmp_path, make_config, words, devices):
    changes = {"data.tokenizer": str(words), "train.num_steps": 1, "guard.self_check": False}
    config = make_config(changes)
    assert train(config, str(tmp_path / "my run"), devices[:1]) == Exit.SUCCESS
    model = words.read_bytes()
    (tmp_path / "my run").rename(tmp_path / "moved")
    words.unlink()
    tokenizer = load(str(tmp_path / "moved"), devices[:1]).tokenizer
    assert tokenizer.model == model
    assert (tmp_path / "moved" / "tokenizer" / "chat_template.jinja").exists()

    words.write_bytes(train_words(["x y z"], vocab_size=8))
    config.train.num_steps = 2
    with pytest.raises(ValueError, match="is not the tokenizer that this run was trained with"):
        train(config, str(tmp_path / "moved"), devices[:1])
    config.checkpoint.allow_changed = ("data.tokenizer",)
    assert train(config, str(tmp_path / "moved"), devices[:1]) == Exit.SUCCESS
    assert load(str(tmp_path / "moved"), devices[:1]).tokenizer.model == words.read_bytes()


def test_a_moved_run_may_name_its_tokenizer_by_its_new_path(
    make_config, make_experiment, tmp_path, capsys
):
    kept = tmp_path / "moved" / "tokenizer" / "tokenizer.json"
    kept.parent.mkdir(parents=True)
    kept.touch()
    changes = {"data.tokenizer": "/old/run/tokenizer/tokenizer.json", "mesh.data": 1}
    old = make_config(changes)
    record = compatibility.RunRecord(conversion.to_json(old))
    moved = make_experiment({"data.tokenizer": str(kept)})
    capsys.readouterr()
    assert compatibility.check_config(record, str(tmp_path / "moved"), moved)
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match=r"config\.data\.tokenizer: .*'bytes'"):
        compatibility.check_config(record, str(tmp_path / "moved"), make_experiment())
