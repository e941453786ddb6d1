"""configs/ladder.py: one dial, and sets of equal compute."""

import importlib.util
from pathlib import Path

import pytest

from lm.config.conversion import resolve
from lm.models import flops
from lm.reliability import data_ledger
from lm.scaling import run_table
from lm.telemetry import metrics
from lm.training.loop import train


@pytest.fixture(scope="module")
def ladder():
    path = Path(__file__).parents[1] / "configs" / "ladder.py"
    spec = importlib.util.spec_from_file_location("ladder", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tokens(config):
    return config.train.num_steps * config.data.batch_size * config.data.length


def test_parameters_grow_with_the_cube_of_the_depth(ladder):
    for depth in (2, 5):
        counted = flops.parameters(resolve(ladder.get_config(str(depth))).model).non_embedding
        assert counted == pytest.approx(12 * 24**2 * depth**3, rel=0.01)
    wide = ladder.get_config("3x64").model
    assert (wide.num_layers, wide.embed_dim, wide.num_heads) == (3, 192, 3)


@pytest.mark.parametrize("depth", [2, 6, 12])
def test_runs_of_an_isoflop_set_cost_the_same(ladder, depth):
    config = ladder.get_config(f"isoflop:1e13:{depth}")
    per_token = flops.flops_per_token(resolve(config).model, config.data.length)
    step = per_token * config.data.batch_size * config.data.length
    assert abs(tokens(config) * per_token - 1e13) <= step / 2


def test_tokens_and_batch_follow_the_parameters(ladder):
    few, many = ladder.get_config("4:10"), ladder.get_config("4:160")
    parameters = flops.parameters(resolve(few).model).non_embedding
    for config, ratio in ((few, 10), (many, 160)):
        assert tokens(config) == pytest.approx(ratio * parameters, rel=0.01)
    assert many.data.batch_size == 4 * few.data.batch_size  # 16 times the tokens


@pytest.mark.parametrize("arg", ["deep", "4:", "isoflop:1e13", "0", "4:-1", "1:2:3"])
def test_an_argument_that_is_no_size_is_refused(ladder, arg):
    with pytest.raises(ValueError, match=f"configs/ladder.py:{arg}"):
        ladder.get_config(arg)


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[1] / "scripts" / "ladder.py"
    spec = importlib.util.spec_from_file_location("ladder_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cool_downs_leave_the_long_run_where_their_decay_begins(ladder, script, tmp_path):
    runs = script.plan(ladder.get_config("3:40"), "3:40", (0.25, 0.5), tmp_path)
    (name, whole), *others = runs
    steps = whole.train.num_steps
    assert name == f"3-40-{steps}" and whole.checkpoint.at == tuple(
        config.init.step for _, config in reversed(others)
    )
    assert [c.train.num_steps for _, c in others] == [round(steps / 2), round(steps / 4)]
    for _, config in others:
        assert config.init.branch_from == str(tmp_path / name)
        assert config.init.step + config.optimizer.schedule.decay_steps == config.train.num_steps
        fifth = config.train.num_steps / 5
        assert config.optimizer.schedule.decay_steps == pytest.approx(fifth, abs=1)
        assert config.optimizer.schedule.warmup_steps == whole.optimizer.schedule.warmup_steps
        assert config.data == whole.data


def test_a_run_killed_after_an_evaluation_between_log_lines_is_unfinished(
    script, make_config, tmp_path, devices
):
    changes = {"train.log_every": 4, "train.eval_every": 3, "train.num_steps": 8}
    changes |= {"data.validation": ("synthetic:markov:40:7",), "guard.self_check": False}
    config = make_config(changes)
    assert train(config, str(tmp_path), devices[:1]) == 0
    assert script.is_finished(tmp_path, 8)
    seen = {}
    path = tmp_path / metrics.METRICS_FILE
    whole = path.read_text().splitlines(keepends=True)
    for step in (3, 6, 8):
        at = max(i for i, text in enumerate(whole) if f'"step": {step}, "kind": "eval"' in text)
        path.write_text("".join(whole[: at + 1]))
        assert script.is_finished(tmp_path, 8) == (step == 8)
        result = run_table.read(str(tmp_path))
        seen[step] = result.tokens
        assert result.step == step
    entries = data_ledger.read(str(tmp_path))
    assert seen == {step: sum(e["filled"] for e in entries[:step]) for step in (3, 6, 8)}
