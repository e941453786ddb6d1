"""Parts of one's own: what docs/extending.md shows, written, built and trained; and mistakes."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from environment import fake_devices

from lm.config import conversion
from lm.training.experiment import Experiment

ROOT = Path(__file__).parent.parent
STANZA = "{} is the colour of the sea,\nand {} of the trees beside it.\n"
COLOURS = ("blue", "green", "grey", "white", "black", "red", "brown", "silver")


def skeletons():
    """{path: text} of the files that docs/extending.md shows."""
    blocks = re.findall(
        r"```python\n# (\S+)\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.S
    )
    assert {path for path, _ in blocks} >= {
        f"mine/{n}.py" for n in ("bigram", "focal", "signum", "poems")
    }
    return dict(blocks)


@pytest.fixture
def package(tmp_path):
    """A folder with the package `mine` and poems."""
    for path, text in skeletons().items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "poems").mkdir()
    for a in COLOURS:
        stanzas = "\n".join(STANZA.format(a, b) for b in COLOURS)
        (tmp_path / "poems" / f"{a}.poem").write_text(stanzas)
    return tmp_path


def run(folder, script, *flags):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *flags],
        env={**fake_devices(1), "PYTHONPATH": "."},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_skeletons_of_the_docs_prepare_and_train(package):
    done = run(
        package, "prepare_data.py", "--data=mine.poems:poems", "--tokenizer=bytes",
        "--out=data/poems", "--validation-fraction=0.2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run(
        package, "train.py", "--config=mine/config.py", "--workdir=runs/mine",
        "--config.objective.gamma=1", "--config.optimizer.momentum=0.8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (package / "runs/mine/metrics.jsonl").open()]
    train = [r for r in records if r["kind"] == "train"]
    assert 0 < train[-1]["focal"] < train[-1]["loss"] < 0.8 * train[0]["loss"]
    head = 512 * 32  # the table is only looked up
    assert train[-1]["flops_seen"] == train[-1]["tokens_seen"] * 3 * 2 * head
    saved = json.loads((package / "runs/mine/config.json").read_text())
    assert saved["objective"] == {"name": "mine.focal", "gamma": 1.0}
    assert (saved["optimizer"]["name"], saved["optimizer"]["momentum"]) == ("mine.signum", 0.8)
    assert "finished" in run(package, "train.py", "--config=runs/mine/config.json",
                             "--workdir=runs/mine").stdout  # fmt: skip

    done = run(package, "prepare_data.py", "--data=theirs.poems:x", "--tokenizer=bytes", "--out=o")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "--data=theirs.poems:x: Python finds no module theirs; give the folder" in done.stderr


# ---- mistakes in parts of one's own ----

MODEL = skeletons()["mine/bigram.py"]


@pytest.fixture
def with_model(tmp_path, monkeypatch, devices, make_config):
    """(text of a model's file) -> an Experiment of it."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, text):
        (tmp_path / f"{name}_package").mkdir()
        (tmp_path / f"{name}_package" / "model.py").write_text(text)
        config = make_config()
        config.model = conversion.default(model=f"{name}_package.model").model
        return Experiment(config, devices[:1])

    return make


def test_a_model_without_a_member_of_the_contract_is_refused(with_model):
    text = re.sub(r"    dtype: .*\n", "", MODEL)
    with pytest.raises(ValueError, match=r"its Config has no dtype, which the contract in"):
        with_model("no_dtype", text)


def test_a_model_whose_parameters_name_no_axes_is_refused(with_model):
    text = re.sub(r"self\.head = .*", "self.head = nn.Dense(c.vocab_size)", MODEL)
    text = text.replace("hidden @ self.head", "self.head(hidden)")
    experiment = with_model("dense", text)
    with pytest.raises(ValueError, match=r"2 of 3 parameters name no logical axes, head\.bias the"):
        experiment.boxed_params  # noqa: B018


def test_an_optimizer_that_is_no_optimizer_is_refused(tmp_path, monkeypatch, make_config, devices):
    monkeypatch.syspath_prepend(tmp_path)
    text = skeletons()["mine/signum.py"]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "no_steps.py").write_text(re.sub(r"STEPS = .*", "", text))
    with pytest.raises(ValueError, match=r"is no component: theirs\.no_steps has no `STEPS`"):
        conversion.default(optimizer="theirs.no_steps")
    bare = text.replace("Config(OptimizerConfig)", "Config")
    (tmp_path / "theirs" / "bare.py").write_text(
        bare.replace("    momentum", '    name: str = field("", "Its name.")\n    momentum')
    )
    config = make_config()
    config.optimizer = conversion.default(optimizer="theirs.bare").optimizer
    with pytest.raises(
        ValueError, match=r"its Config must be a subclass of lm\.config\.schema\.OptimizerConfig"
    ):
        Experiment(config, devices[:1])


def test_an_optimizer_whose_build_gives_no_list_is_refused(
    tmp_path, monkeypatch, make_config, devices
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_single").mkdir()
    text = skeletons()["mine/signum.py"].partition("def build(")[0]
    text += "def build(config, context):\n    return optax.identity()\n"
    (tmp_path / "mine_single" / "single.py").write_text(text)
    config = make_config()
    config.optimizer = conversion.default(optimizer="mine_single.single").optimizer
    with pytest.raises(ValueError, match=r"its build must return a list of optax transformations"):
        _ = Experiment(config, devices[:1]).tx


def test_a_loss_without_its_sums_is_refused(make_experiment):
    experiment = make_experiment()
    own = lambda *args, **options: (0.0, {"tokens": 1.0})  # noqa: E731
    experiment.objective = dataclasses.replace(experiment.objective, loss=own)
    with pytest.raises(ValueError, match=r"sums without loss"):
        experiment.lower_train_step()
