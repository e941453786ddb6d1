"""--config and --config.KEY=VALUE: files, settings, and mistakes in both as one line."""

import os
import re
import subprocess
import sys

import pytest
from environment import run_script

from lm.config import command_line, conversion
from lm.config.conversion import default, resolve, to_json
from lm.telemetry import metrics


def set_all(*settings, config=None):
    config = config or default()
    for setting in settings:
        conversion.assign(config, setting)
    return config


def test_settings_are_told_from_other_flags():
    argv = [
        "train.py",
        "--config=a.py",
        "--config.seed=3",
        "--config.data.length",
        "64",
        "--explain",
    ]
    argv += ["--config.model.qk_norm", "--noconfig.data.shuffle", "--", "--config.seed=4"]
    rest, settings = command_line.split(argv)
    assert rest == ["train.py", "--config=a.py", "--explain", "--", "--config.seed=4"]
    assert settings == ["seed=3", "data.length=64", "model.qk_norm=True", "data.shuffle=False"]
    resolved = resolve(set_all(*settings))
    assert (resolved.seed, resolved.data.length) == (3, 64)
    assert resolved.model.qk_norm and not resolved.data.shuffle


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("data.train=data/a", lambda c: c.data.train == ("data/a",)),
        ("data.train=('a','b')", lambda c: c.data.train == ("a", "b")),
        ("data.train=it's", lambda c: c.data.train == ("it's",)),
        ("data.tokenizer='quoted'", lambda c: c.data.tokenizer == "'quoted'"),
        ("checkpoint.at=5", lambda c: c.checkpoint.at == (5,)),
        ("data.shuffle=false", lambda c: c.data.shuffle is False),
        ("train.num_tokens=1e9", lambda c: c.train.num_tokens == 10**9),
        ("train.num_steps=None", lambda c: c.train.num_steps is None),
        ("optimizer.clip_norm=2", lambda c: c.optimizer.clip_norm == 2.0),
        ("init.from=runs/a", lambda c: c.init.from_ == "runs/a"),
        ("init.from_=runs/a", lambda c: c.init.from_ == "runs/a"),
        ("mesh.rules=(('mlp', None),)", lambda c: c.mesh.rules == (("mlp", None),)),
    ],
)
def test_a_text_becomes_a_value_of_the_keys_type(setting, read):
    assert read(resolve(set_all(setting)))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("modle.num_layers=2", "config.modle is not a config key; did you mean config.model?"),
        ("lr=1e-3", "config.lr is not a config key; did you mean config.optimizer.learning_rate?"),
        ("train.num_steps=abc", "config.train.num_steps must be int, got 'abc'"),
        ("train.num_steps=1.5", "config.train.num_steps must be int, got '1.5'"),
        ("optimizer.learning_rate='1'", "config.optimizer.learning_rate must be float"),
        ("model=3", "config.model is a section: set its keys"),
        ("train.num_steps.x=3", "config.train.num_steps is a value and has no keys"),
        ("objective.name=prefixx", "config.objective.name ('prefixx') is not in lm.objectives"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_its_path(setting, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        set_all(setting)


def test_a_number_that_is_none_is_refused_by_its_range():
    with pytest.raises(
        ValueError, match=r"config\.optimizer\.learning_rate \(nan\) must be at least"
    ):
        resolve(set_all("optimizer.learning_rate=nan"))


def test_a_component_named_by_a_flag_has_all_its_fields_as_flags():
    config = set_all("objective.name=span_corruption", "objective.mean_span=5")
    assert resolve(config).objective.mean_span == 5.0
    with pytest.raises(ValueError, match=r"config\.objective\.mean_span is not a config key"):
        set_all("objective.mean_span=5")


def test_a_model_named_by_a_flag_keeps_what_was_set_and_takes_its_own_defaults():
    config = default()
    config.model.update({"vocab_size": 99, "num_heads": 2})
    set_all("model.name=lstm", "model.hidden_dim=7", config=config)
    model = resolve(config).model
    assert (model.vocab_size, model.hidden_dim) == (99, 7)  # set; num_heads, too, is gone
    assert (model.embed_dim, model.init_std) == (200, 0.05)  # not the decoder's 768 and 0.02


def test_names_of_components_count_before_their_fields(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from lm.config.conversion import default\ndef get_config():\n    return default()\n"
    )
    settings = ["objective.bidirectional=False", "objective.name=prefix", "seed=1", "seed=2"]
    config = command_line.read(str(path), settings)
    assert config.objective.to_dict() == {"name": "prefix", "bidirectional": False}
    assert config.seed == 2 and config.is_locked


FILES = {
    "gone.py": (None, r"--config=\S+gone\.py: no such file"),
    "raises.py": (
        "def size():\n    raise ValueError('no size 3')\n\ndef get_config():\n    return size()\n",
        r"raises\.py, line 2: no size 3",
    ),
    "key.py": (
        "from lm.config.conversion import default\n\ndef get_config():\n    c = default()\n"
        "    c.model.num_layer += 1\n    return c\n",
        r"key\.py, line 5: AttributeError: .*num_layer",
    ),
    "type.py": (
        "from lm.config.conversion import default\n\ndef get_config():\n    c = default()\n"
        "    c.train.num_steps = 'many'\n    return c\n",
        r"type\.py, line 5: TypeError: .*num_steps",
    ),
    "syntax.py": (
        "def get_config(:\n    pass\n",
        r"syntax\.py, line 1: SyntaxError: invalid syntax",
    ),
    "name.py": ("\nx = y\n", r"name\.py, line 2: NameError: name 'y' is not defined"),
    "empty.py": ("", r"empty\.py: it has no function get_config"),
    "none.py": ("def get_config():\n    pass\n", r"none\.py: get_config returns NoneType"),
    "text.txt": ("hello", r"text\.txt is neither a Python file"),
    "broken.json": ("{\n 'model'", r"broken\.json, line 2: no JSON: "),
    "other.json": (
        '{"modle": {}}',
        r"other\.json: config\.modle is not a config key; did you mean",
    ),
    "less.json": ('{"model": {}}', r"less\.json: config\.model\.name must name a component"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_mistake_in_a_config_file_is_one_line_with_file_and_line(name, tmp_path):
    text, expected = FILES[name]
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=expected) as error:
        command_line.load(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_size_that_a_config_does_not_have_is_one_line():
    with pytest.raises(
        ValueError, match=r"gpt2\.py, line \d+: .*999m is not a size; there are: 124m"
    ):
        command_line.load("configs/gpt2.py:999m")


def test_the_config_of_a_run_is_a_config_file(tmp_path):
    config = default(objective="prefix")
    config.optimizer.learning_rate = 0.5
    (tmp_path / "config.json").write_text(to_json(config))
    again = command_line.load(str(tmp_path / "config.json"))
    assert resolve(again) == resolve(config)
    with pytest.raises(ValueError, match=r"is a folder; did you mean --config=.*/config\.json\?"):
        command_line.load(str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--config.modle.num_layers=2"], "--config.modle.num_layers=2 changes a config"),
        (
            ["--model.num_layers=2"],
            "unrecognized arguments: --model.num_layers=2; did you mean --config.model.num_layers?",
        ),
        (
            ["--confg.train.num_steps=4"],
            "unrecognized arguments: --confg.train.num_steps=4; did you mean "
            "--config.train.num_steps?",
        ),
        (["--wrokdir=x"], "unrecognized arguments: --wrokdir=x; did you mean --workdir?"),
        (
            ["--config=configs/tiny.py", "--config.modle.num_layers=2"],
            "config.modle is not a config key; did you mean config.model?",
        ),
        (
            ["--config=configs/tiny.py", "--config.train.num_steps='5'"],
            "config.train.num_steps must be int, got \"'5'\"",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(flags, expected):
    done = run_script("train", *flags, "--workdir=never")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {expected}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_x64_is_refused_at_the_start(tmp_path):
    done = subprocess.run(
        [sys.executable, "scripts/train.py", "--config=configs/smoke.py", f"--workdir={tmp_path}"],
        env={**os.environ, "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: JAX_ENABLE_X64 is set"), done
    assert done.stderr.count("\n") == 1


def test_the_config_of_a_run_runs_it_again(tmp_path):
    small = ["--config.train.num_steps=2", "--config.guard.self_check=False"]
    first = run_script("train", "--config=configs/smoke.py", f"--workdir={tmp_path / 'a'}", *small)
    assert first.returncode == 0, first.stderr
    config = f"--config={tmp_path / 'a' / 'config.json'}"
    again = run_script("train", config, f"--workdir={tmp_path / 'b'}")
    assert again.returncode == 0, again.stderr
    a, b = ((tmp_path / n / "config.json").read_text() for n in "ab")
    assert a == b
    losses = [[r["loss"] for r in metrics.read(str(tmp_path / n))] for n in "ab"]
    assert len(losses[0]) == 3 and losses[0] == losses[1]


def test_another_name_brings_the_fields_of_that_component_in_a_config_too():
    config = default()
    config.model.vocab_size = 99
    config.update_from_flattened_dict({"objective.name": "mlm", "objective.rate": 0.3})
    config = config.copy_and_resolve_references()
    config.lock()
    config.model.name = "lstm"
    config.model.hidden_dim = 5
    resolved = resolve(config)
    assert (resolved.objective.rate, resolved.model.hidden_dim) == (0.3, 5)
    assert resolved.model.vocab_size == 99 and config.model.is_locked


@pytest.mark.parametrize("order", [1, -1])
def test_a_flattened_dict_may_name_a_component_before_or_after_its_fields(order):
    config = default()
    changes = {"optimizer.schedule.kind": "constant", "optimizer.nesterov": True}
    changes |= {"optimizer.learning_rate": 0.5, "optimizer.name": "muon"}
    config.update_from_flattened_dict(dict(list(changes.items())[::order]))
    found = config.optimizer
    assert (found.name, found.schedule.kind, found.learning_rate) == ("muon", "constant", 0.5)
    assert found.nesterov
