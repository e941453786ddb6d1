"""Evaluations inside a run: the figures of its checkpoints, each step once, and training as
without them.
"""

import contextlib
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from environment import fake_devices

from lm.checkpoint.manager import Checkpoints
from lm.config import command_line, conversion
from lm.config.conversion import evaluation
from lm.evaluation import blimp, task_metrics
from lm.evaluation.kinds import prompts as prompts_kind
from lm.exit_codes import Exit
from lm.generation.score import Scorer
from lm.parallel import process_group
from lm.parallel.consensus import Vote
from lm.telemetry import jsonl, metrics
from lm.training import loop, run_evaluations
from lm.training.experiment import Experiment
from lm.training.run_evaluations import Budget, RunEvaluations
from scripts import evaluate as evaluate_script

ROOT = Path(__file__).parents[1]
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with BLiMP's files: 2 paradigms of 20 and 12 pairs of many lengths; and prompts."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    (root / "blimp").mkdir()
    for paradigm, count in (("a1", 20), ("b1", 12)):
        lines = []
        for _ in range(count):
            letters = (rng.integers(97, 103, rng.integers(3, 20)).tolist() for _ in "ab")
            good, bad = (bytes(x).decode() for x in letters)
            lines.append({"UID": paradigm, "linguistics_term": f"term_{paradigm[0]}",
                          "sentence_good": good, "sentence_bad": bad})  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (root / "blimp" / f"{paradigm}.jsonl").write_text(text)
    (root / "prompts.txt").write_text("abc\nthe\n")
    records = [{"source": "ab" * i, "target": "ba"} for i in range(1, 6)]
    (root / "task.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return root


@pytest.fixture
def config_of(make_config, folder):
    """(changes) -> the config of a tiny run with two evaluations."""

    def make(changes=None, **evaluations):
        config = make_config(
            {
                "data.validation": ("synthetic:markov:8:7",),
                "train.num_steps": STEPS,
                "train.log_every": 1,
                "train.eval_every": 4,
                "checkpoint.every": 4,
                "checkpoint.keep_last": 100,
                "guard.self_check": False,
                **(changes or {}),
            }
        )
        config.evaluations = evaluations or {
            "grammar": evaluation("blimp", data=str(folder / "blimp"), every=2),
            "stories": evaluation(
                "prompts",
                prompts=("x y",),
                file=str(folder / "prompts.txt"),
                max_new_tokens=5,
                every=4,
            ),
        }
        return config

    return make


def rows(workdir):
    return jsonl.read(f"{workdir}/{metrics.EVALUATIONS_FILE}")


def due(workdir):
    return [(r["step"], r["source"]) for r in rows(workdir)]


ALL_DUE = [
    (2, "grammar"),
    (4, "grammar"),
    (4, "stories"),
    (6, "grammar"),
    (8, "grammar"),
    (8, "stories"),
]


def without_clock(record):
    return {k: v for k, v in record.items() if k != "seconds"}


def states(experiment, workdir):
    """{step: bytes of every leaf}."""
    with Checkpoints(str(workdir), experiment.config.checkpoint, read_only=True) as checkpoints:
        steps = checkpoints.steps()
        found = {s: checkpoints.restore(experiment.abstract_state, s)[0] for s in steps}
    return {s: [np.asarray(x).tobytes() for x in jax.tree.leaves(x)] for s, x in found.items()}


@contextlib.contextmanager
def compilations():
    """A list that gets the events of compilations, and is cleared by its reader."""
    found = []

    def listen(event, duration_secs, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


# ---- figures, and where they go ----


@pytest.mark.parametrize(
    "changes",
    [
        {"model.dtype": "bfloat16", "optimizer.ema_decay": 0.5, "optimizer.learning_rate": 0.05},
        pytest.param({"mesh.data": 2, "mesh.fsdp": 4}, marks=pytest.mark.slow),
    ],
    ids=["bfloat16, averaged weights", "eight devices"],
)
def test_records_are_those_of_the_script_afterwards(
    changes, config_of, shared_steps, devices, tmp_path, monkeypatch, capsys
):
    used = devices if "mesh.fsdp" in changes else devices[:1]
    assert loop.train(config_of(changes), str(tmp_path), used) == 0
    capsys.readouterr()
    assert due(tmp_path) == ALL_DUE
    for row in rows(tmp_path):
        assert row["kind"] == "evaluation" and row["seconds"] >= 0 and "partial" not in row
    last = rows(tmp_path)[-2:]
    assert set(last[0]) == {
        *("step", "kind", "source", "n", "seconds", "accuracy", "accuracy_stderr"),
        *("term_a", "term_a_stderr", "term_b", "term_b_stderr"),
    }
    assert (last[0]["n"], last[1]["n"]) == (32, 3)
    assert last[0]["accuracy"] == pytest.approx((last[0]["term_a"] + last[0]["term_b"]) / 2)
    assert [s["prompt"] for s in last[1]["samples"]] == ["x y", "abc", "the"]
    assert all(s["text"] for s in last[1]["samples"]) and last[1]["logprob"] < 0
    assert " ± " in (line := run_evaluations.describe(last[0])) and line.startswith("grammar · ")

    monkeypatch.setattr(jax, "devices", lambda: used)
    for step in (4, 8):
        words = ["evaluate.py", f"--workdir={tmp_path}", "--evaluations=all", f"--step={step}"]
        monkeypatch.setattr(sys, "argv", words)
        assert evaluate_script.main() == 0
        printed = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x[:1] == "{"]
        expected = [without_clock(r) for r in rows(tmp_path) if r["step"] == step]
        assert [without_clock(r) for r in printed] == expected and len(printed) == 2
    monkeypatch.setattr(sys, "argv", [*words[:2], "--evaluations=grammer"])
    with pytest.raises(ValueError, match=r"--evaluations=grammer: .* has grammar, stories"):
        evaluate_script.main()


def test_the_accuracy_is_that_of_a_plain_loop_over_pairs(make_experiment, folder):
    experiment = make_experiment({})
    experiment.config.evaluations.update(
        conversion.resolve(
            {
                **experiment.config_dict.to_dict(),
                "evaluations": {"g": {"name": "blimp", "data": str(folder / "blimp")}},
            }
        ).evaluations
    )
    params = experiment.init_state().params
    record = RunEvaluations(experiment).run("g", params, 0)
    scorer = Scorer(experiment.model, params, experiment.tokenizer)
    passed = {"a1": [], "b1": []}
    for pair in blimp.read(str(folder / "blimp")):
        good, bad = (s.logprob for s in scorer.rolling([pair.good, pair.bad]))
        passed[pair.paradigm].append(float(good > bad))
    means = {name: statistics.fmean(x) for name, x in passed.items()}
    errors = {name: statistics.stdev(x) / len(x) ** 0.5 for name, x in passed.items()}
    assert 0 < record["accuracy"] < 1 and record["term_a"] == pytest.approx(means["a1"])
    assert record["accuracy"] == pytest.approx(statistics.fmean(means.values()))
    assert record["term_b_stderr"] == pytest.approx(errors["b1"])
    both = (errors["a1"] ** 2 + errors["b1"] ** 2) ** 0.5 / 2
    assert record["accuracy_stderr"] == pytest.approx(both)


def test_training_keeps_its_bits_and_its_text(config_of, shared_steps, devices, tmp_path):
    plain = config_of()
    plain.evaluations = {}
    for name, config in (("with", config_of()), ("without", plain)):
        assert loop.train(config, str(tmp_path / name), devices[:1]) == 0
    assert not (tmp_path / "without" / metrics.EVALUATIONS_FILE).exists()
    experiments = [Experiment(config, devices[:1]) for config in (config_of(), plain)]
    found = [states(e, tmp_path / n) for e, n in zip(experiments, ("with", "without"), strict=True)]
    assert found[0] == found[1] and sorted(found[0]) == [4, 8]
    texts = [e.lower_train_step().as_text() for e in experiments]
    assert texts[0] == texts[1] and len(texts[0]) > 1000

    def trained(name):
        clocks = {"seconds", "tokens_per_second", "goodput", "host_bytes", "kwh_estimated"}
        clocks |= {*metrics.HOST_WORK}
        records = metrics.read(str(tmp_path / name))
        return [{k: v for k, v in r.items() if k not in clocks} for r in records]

    assert trained("with") == trained("without")


def test_a_second_evaluation_compiles_nothing(config_of, devices):
    experiment = Experiment(config_of({"model.mlp_dim": 40}), devices[:1])  # of no other test
    evaluations = RunEvaluations(experiment)
    params = experiment.init_state().params
    others = jax.tree.map(lambda x: x + 0.01, params)
    with compilations() as found:
        first = [evaluations.run(name, params, 0) for name in evaluations.names]
        assert len(found) >= 3
        found.clear()
        second = [evaluations.run(name, others, 1) for name in evaluations.names]
        assert found == []
    assert [without_clock(r) for r in first] != [without_clock(r) for r in second]


# ---- kills ----


def test_killed_in_an_evaluation_a_run_has_each_record_once(
    config_of, shared_steps, devices, tmp_path, monkeypatch
):
    """An error in the evaluation after step 6, after that of step 6 of another name was written."""
    config = config_of()
    config.evaluations.stories.every = 2
    assert loop.train(config, str(tmp_path / "whole"), devices[:1]) == 0
    run, count = prompts_kind.Continuations.run, 0

    def fail_once(self, params, budget):
        nonlocal count
        count += 1
        if count == 3:
            raise RuntimeError("INTERNAL: the device is gone")
        return run(self, params, budget)

    monkeypatch.setattr(prompts_kind.Continuations, "run", fail_once)
    with pytest.raises(RuntimeError, match="the device is gone"):
        loop.train(config, str(tmp_path / "killed"), devices[:1])
    assert due(tmp_path / "killed")[-1] == (6, "grammar")
    assert loop.train(config, str(tmp_path / "killed"), devices[:1]) == 0
    whole, killed = ([without_clock(r) for r in rows(tmp_path / n)] for n in ("whole", "killed"))
    assert whole == killed and len(whole) == 2 * STEPS // 2


def test_what_the_resumed_step_lacks_is_made_up_for_and_nothing_is_done_twice(
    config_of, shared_steps, devices, tmp_path, capsys
):
    """The signal comes with step 4, after which training is evaluated; the second start has new
    evaluations.
    """
    before = config_of()
    before.evaluations = {}
    votes = iter([Vote(), Vote(), Vote(), Vote(signal.SIGTERM)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.TrainingSession, "agreed_vote", lambda session: next(votes))
        assert loop.train(before, str(tmp_path), devices[:1]) == Exit.TERMINATED
    assert [r["step"] for r in metrics.read(str(tmp_path)) if r["kind"] == "eval"] == []
    assert loop.train(config_of(), str(tmp_path), devices[:1]) == 0
    assert due(tmp_path) == ALL_DUE[1:]
    evals = [r["step"] for r in metrics.read(str(tmp_path)) if r["kind"] == "eval"]
    assert evals == [4, 8]
    assert "changed since this run began: config.evaluations.grammar" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_process_loses_no_record_and_has_none_twice(folder, tmp_path):
    """SIGKILL while an evaluation is under way, in every third start, until the run has ended."""
    flags = [
        "--config.train.num_steps=60",
        "--config.evaluations.grammar.name=blimp",
        f"--config.evaluations.grammar.data={folder / 'blimp'}",
        "--config.evaluations.grammar.every=5",
        "--config.evaluations.stories.name=prompts",
        "--config.evaluations.stories.prompts=('a', 'b')",
        "--config.evaluations.stories.max_new_tokens=8",
        "--config.evaluations.stories.every=10",
    ]
    command = [sys.executable, str(ROOT / "scripts/train.py"), f"--config={ROOT}/configs/smoke.py"]

    def start(name):
        words = [*command, f"--workdir={tmp_path / name}", *flags]
        return subprocess.Popen(words, env=fake_devices(1), stdout=subprocess.DEVNULL)

    assert start("whole").wait(timeout=300) == 0
    kills = 0
    for at in (7, 20, 41):
        process = start("killed")
        while process.poll() is None and all(s < at for s, _ in due(tmp_path / "killed")):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 3 and start("killed").wait(timeout=300) == 0
    whole, killed = ([without_clock(r) for r in rows(tmp_path / n)] for n in ("whole", "killed"))
    assert whole == killed and len(whole) == 12 + 6


# ---- time ----


class Clock:
    """A clock that moves on by a second whenever it is read."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def test_an_evaluation_whose_time_is_over_is_partial_and_marked(
    config_of, folder, devices, monkeypatch
):
    config = config_of(
        g=evaluation("blimp", data=str(folder / "blimp"), seconds=1.5),
        s=evaluation(
            "prompts", prompts=("a", "b", "c"), batch_size=2, max_new_tokens=4, seconds=0.5
        ),
    )
    evaluations = RunEvaluations(Experiment(config, devices[:1]))
    params = evaluations._experiment.init_state().params
    object.__setattr__(evaluations._all["g"][1], "part_size", 8)
    monkeypatch.setattr(run_evaluations, "_clock", Clock())
    record = evaluations.run("g", params, 3)
    assert (record["n"], record["total"], record["partial"]) == (16, 32, True)  # two parts of 8
    assert "n 16 of 32, partial" in run_evaluations.describe(record)
    sampled = evaluations.run("s", params, 3)
    assert (sampled["n"], sampled["partial"]) == (2, True)
    assert [row["prompt"] for row in sampled["samples"]] == ["a", "c"]  # every second one
    whole = evaluations.run("g", params, 3, limited=False)
    assert whole["n"] == 32 and "partial" not in whole and whole["accuracy"] != record["accuracy"]


def test_an_evaluation_without_any_figure_is_skipped_with_one_line(config_of, devices):
    class Nothing:
        def run(self, params, budget):
            return None

    evaluations = RunEvaluations(Experiment(config_of(), devices[:1]))
    evaluations._all["grammar"] = evaluations._all["grammar"][0], Nothing()
    record = evaluations.run("grammar", {}, 4)
    assert without_clock(record) == {
        **{"step": 4, "kind": "evaluation", "source": "grammar"},
        **{"n": 0, "partial": True},
    }
    assert "grammar · skipped: " in run_evaluations.describe(record)


@pytest.mark.parametrize("of_lead", [True, False])
def test_the_clock_of_the_lead_decides_for_all_processes(of_lead, monkeypatch):
    budget = Budget(1000.0 if of_lead else 1e-9)
    asked = []

    def from_lead(name, make):
        asked.append(make())
        return of_lead

    monkeypatch.setattr(process_group, "from_lead", from_lead)
    parts = list(budget.parts(10, 4))
    assert [len(part) for part in parts] == ([4] if of_lead else [4, 3, 3])
    assert set(asked) == {not of_lead}
    assert sorted(i for part in Budget().parts(10, 4) for i in part) == list(range(10))


# ---- tasks ----


def test_a_task_is_measured_as_by_predict(config_of, folder, devices):
    from lm.evaluation.predict import predict

    c = evaluation("task", data=(str(folder / "task.jsonl"),), metrics=("answers",), batch_size=2)
    config = config_of(t=c | {"max_new_tokens": 4})
    seq2seq = conversion.default(objective="seq2seq")
    config.objective = seq2seq.objective
    config.data.train, config.data.validation = ("synthetic:reverse",), ()
    experiment = Experiment(config, devices[:1])
    params = experiment.init_state().params
    record = RunEvaluations(experiment).run("t", params, 0)
    sources = ["ab" * i for i in range(1, 6)]
    texts = [p.text for p in predict(experiment, params, sources, max_new_tokens=4)]
    expected = task_metrics.answers(texts, [["ba"]] * 5)
    assert {k: record[k] for k in expected} == pytest.approx(expected) and record["n"] == 5
    assert {"EM_stderr", "F1_stderr"} <= record.keys()


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """The very same of up to 20 records; the same on average of groups of more."""

    def share(texts, references):
        pairs = zip(texts, references, strict=True)
        return {"share": statistics.fmean(text in refs for text, refs in pairs)}

    rng = np.random.default_rng(0)
    for count, draws, tolerance in ((12, 1, 1e-9), (100, 30, 0.1)):
        found, wanted = [], []
        for _ in range(draws):
            texts = ["x" if x < 0.3 else "y" for x in rng.random(count)]
            errors = task_metrics.standard_errors(share, texts, [["x"]] * count)
            found.append(errors["share"] ** 2)
            wanted.append(np.var([text == "x" for text in texts], ddof=1) / count)
        assert np.mean(found) == pytest.approx(np.mean(wanted), rel=tolerance)
    assert task_metrics.standard_errors(task_metrics.answers, ["a"], [["a"]]) == {}


# ---- configs ----


def test_the_command_line_adds_an_evaluation_and_json_keeps_it(folder):
    settings = [
        "evaluations.grammar.every=50",
        "evaluations.grammar.seconds=2",
        "evaluations.grammar.name=blimp",
        "evaluations.grammar.data=x.zip",
    ]
    config = command_line.read(str(ROOT / "configs/smoke.py"), settings)
    [(name, entry)] = conversion.resolve(config).evaluations.items()
    assert (name, entry.name, entry.config.every) == ("grammar", "blimp", 50)
    assert (entry.config.seconds, entry.config.data, entry.config.limit) == (2.0, "x.zip", None)
    again = conversion.from_json(conversion.to_json(config))
    assert conversion.resolve(again) == conversion.resolve(config)
    assert hash(conversion.resolve(again)) == hash(conversion.resolve(config))
    rows = {path: (value, usual) for path, value, usual, _ in conversion.explain(config)}
    assert rows["evaluations.grammar.every"] == (50, 0)
    assert all(x[3].endswith(".") for x in conversion.explain(config))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"name": "blmp"},
            r"config\.evaluations\.x\.name \('blmp'\) is not in .*did you mean blimp\?",
        ),
        ({"evry": 3}, r"config\.evaluations\.x\.evry is not a config key; did you mean .*every\?"),
        ({"every": -1}, r"config\.evaluations\.x\.every \(-1\) must be at least 0"),
        ({"limit": 0}, r"config\.evaluations\.x\.limit \(0\) must be at least 1"),
        ({"data": ""}, r"config\.evaluations\.x\.data is empty: name BLiMP\.zip"),
        ({"data": "no/such.zip"}, r"config\.evaluations\.x\.data: no/such\.zip is neither"),
    ],
)
def test_a_wrong_evaluation_is_refused_before_anything_is_compiled(
    changes, message, config_of, folder, devices, tmp_path, monkeypatch
):
    config = config_of()
    tree = config.to_dict()
    tree["evaluations"] = {"x": {"name": "blimp", "data": str(folder / "blimp"), **changes}}
    refused(tree, message, devices, tmp_path, monkeypatch)


def refused(tree, message, devices, workdir, monkeypatch):
    monkeypatch.setattr(Experiment, "train_step", property(lambda self: pytest.fail("compiled")))
    with pytest.raises(ValueError, match=message):
        config = conversion.from_json(json.dumps(tree))
        loop.train(config, str(workdir / "run"), devices[: config.mesh.stage])
    assert not (workdir / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "changes, entry, message",
    [
        (
            {"model": "encoder", "objective": "mlm"},
            {"name": "prompts", "prompts": ("a",)},
            r"config\.evaluations\.x: config\.model is not causal",
        ),
        (
            {"model": "clip", "objective": "contrastive"},
            {"name": "prompts", "prompts": ("a",)},
            r"config\.evaluations\.x: config\.model.* no ",
        ),
        (
            {},
            {"name": "prompts", "prompts": ("a" * 30,)},
            r"config\.evaluations\.x: config\.model\.max_length \(32\) must be at least .* \(30\)",
        ),
        ({}, {"name": "prompts"}, r"config\.evaluations\.x\.prompts is empty"),
        ({}, {"name": "prompts", "file": "none.txt"}, r"config\.evaluations\.x\.file: .*none\.txt"),
        (
            {},
            {"name": "task", "data": ("a.jsonl",), "metrics": ("answers",)},
            r"config\.evaluations\.x\.task: config\.objective must be seq2seq",
        ),
        ({}, {"name": "task", "metrics": ("answers",)}, r"config\.evaluations\.x\.data is empty"),
        (
            {"stages": 2},
            {"name": "prompts", "prompts": ("a",)},
            r"config\.evaluations\.x: generation .*config\.mesh\.stage \(2\) must be 1",
        ),
    ],
)
def test_a_model_that_cannot_do_it_is_refused_with_the_path(
    changes, entry, message, make_config, devices, tmp_path, monkeypatch
):
    config = make_config({})
    if "model" in changes:
        other = conversion.default(changes["model"], changes["objective"])
        config.model, config.objective = other.model, other.objective
        config.model.vocab_size, config.model.max_length = 264, 32
    if changes.get("model") == "clip":
        config.data.train = ("synthetic:shapes",)
    tree = config.to_dict()
    if "stages" in changes:
        tree["mesh"] |= {"stage": 2, "data": 1}
        tree["model"]["pipeline"]["num_microbatches"] = 2
    tree["evaluations"] = {"x": entry}
    refused(tree, message, devices, tmp_path, monkeypatch)
