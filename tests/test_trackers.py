"""Trackers of a run: what they get through kills, outages, hangs and rollbacks."""

import threading
import time

import pytest

from lm.config import conversion
from lm.telemetry import metrics
from lm.telemetry.trackers import background, opening
from lm.telemetry.trackers.tracker import RunInfo, by_step, value_name, values_by_name
from lm.training.loop import train


class Service:
    """A tracker that keeps {name: [(step, value), ...]} of a run, in the order of arrival."""

    def __init__(self):
        self.values, self.statuses, self.ids, self.failures = {}, [], set(), []
        self.hanging, self.lost = threading.Event(), 0
        self.go_on = threading.Event()

    def fail(self, times):
        self.failures = [ConnectionError("no route to host\nat all")] * times

    def steps(self, name):
        return [step for step, _ in self.values.get(name, [])]

    def client(self):
        service = self

        class Client:
            def __init__(self, info, run_id):
                service.check()
                service.ids.add(run_id)
                self.info = info

            def last_steps(self):
                return {name: values[-1][0] for name, values in service.values.items()}

            def log(self, rows):
                for step, values in rows:
                    service.check()
                    for name, value in values.items():
                        service.values.setdefault(name, []).append((step, value))

            def table(self, step, name, rows):
                self.log([(step, {name: rows})])

            def picture(self, step, name, png):
                self.log([(step, {name: png})])

            def close(self, status):
                service.check()
                service.statuses.append(status)

            @staticmethod
            def abandon():
                service.lost += 1

        return Client

    def check(self):
        if self.hanging.is_set():
            self.go_on.wait()
        if self.failures:
            raise self.failures.pop()


@pytest.fixture
def service(monkeypatch):
    found = Service()
    monkeypatch.setitem(opening.REMOTE, "wandb", found.client())
    monkeypatch.setattr(opening, "find_spec", lambda name: name)
    monkeypatch.setattr(background, "PAUSES", (0.01, 0.05))
    yield found
    found.go_on.set()


@pytest.fixture
def info(tmp_path):
    return RunInfo(str(tmp_path), "lm", (), "", {}, {})


def record(step, **values):
    return {"step": step, "kind": "train", **({"loss": 1 / step} | values)}


def write(trackers, steps):
    for step in steps:
        trackers.write(step, [record(step)])


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def in_file(info, name):
    return [r["step"] for r in metrics.read(info.workdir) if name in r]


def test_numbers_of_records_are_named_by_kind_and_source():
    train = {"step": 4, "kind": "train", "loss": 2.0, "tokens_seen": 7}
    evals = [
        {"step": 4, "kind": "eval", "source": f"/data/{s}/validation", "loss": 3.0}
        for s in ("books", "code")
    ]
    assert values_by_name([train, *evals]) == {
        "train/loss": 2.0,
        "train/tokens_seen": 7,
        "eval/books/validation/loss": 3.0,
        "eval/code/validation/loss": 3.0,
    }
    assert value_name("eval/synthetic:markov(1)/../x.y") == "eval/synthetic_markov_1_/x.y"


def test_a_resumed_run_goes_on_in_its_run_without_a_step_twice_or_lost(service, info):
    first = opening.open_trackers(("jsonl", "wandb"), info, 0, print)
    write(first, range(1, 8))
    until(lambda: len(service.steps("train/loss")) == 7)
    # a kill: nothing is closed, and the client had not sent steps 5 to 7 itself
    service.values["train/loss"] = service.values["train/loss"][:4]
    again = opening.open_trackers(("jsonl", "wandb"), info, 6, print)
    again.write(6, [{"step": 6, "kind": "eval", "source": "held_out", "loss": 9.0}])
    write(again, range(7, 10))
    again.close("finished")
    assert service.values["train/loss"] == [(step, 1 / step) for step in range(1, 10)]
    assert service.values["eval/held_out/loss"] == [(6, 9.0)]
    assert len(service.ids) == 1 and service.statuses == ["finished"]


def test_steps_that_a_rollback_does_again_keep_their_first_values_there(service, info):
    trackers = opening.open_trackers(("jsonl", "wandb"), info, 0, print)
    write(trackers, range(1, 6))
    until(lambda: len(service.steps("train/loss")) == 5)
    trackers.roll_back(2)
    for step in range(3, 8):
        trackers.write(step, [record(step, loss=100.0)])
    trackers.close("finished")
    assert in_file(info, "loss") == service.steps("train/loss") == list(range(1, 8))
    assert [value for _, value in service.values["train/loss"]] == [
        *(1 / step for step in range(1, 6)),
        100.0,
        100.0,
    ]


def test_samples_and_pictures_of_a_finished_run_are_sent_with_what_was_missing(service, info):
    write(opening.open_trackers(("jsonl",), info, 0, print), range(1, 4))
    rows = [{"prompt": "a", "text": " b"}]
    media = {"tables": {"samples": rows}, "pictures": {"loss": b"png"}}
    opening.send_rest(("jsonl", "wandb"), info, print, step=3, **media)
    assert service.steps("train/loss") == [1, 2, 3]
    assert service.values["samples"] == [(3, rows)] and service.values["loss"] == [(3, b"png")]


def test_an_outage_costs_one_warning_and_no_record(service, info):
    warnings = []
    service.fail(times=7)
    trackers = opening.open_trackers(("jsonl", "wandb"), info, 0, warnings.append)
    write(trackers, range(1, 6))
    until(lambda: len(service.steps("train/loss")) == 5)
    service.fail(times=3)
    write(trackers, range(6, 11))
    until(lambda: len(service.steps("train/loss")) == 10)
    trackers.close("finished")
    assert service.steps("train/loss") == list(range(1, 11))
    [warning] = warnings
    assert "config.log.trackers: wandb fails" in warning
    assert "ConnectionError: no route to host. Training goes on" in warning


def test_a_tracker_that_hangs_delays_nothing_and_gets_the_rest_when_it_wakes(
    service, info, monkeypatch
):
    monkeypatch.setattr(background, "QUEUE_ITEMS", 5)
    warnings = []
    service.hanging.set()
    trackers = opening.open_trackers(("jsonl", "wandb"), info, 0, warnings.append)
    began = time.monotonic()
    write(trackers, range(1, 101))
    assert time.monotonic() - began < 1.0
    assert "does not take its records, 5 wait for it" in warnings[0]
    service.hanging.clear()
    service.go_on.set()
    until(lambda: len(service.steps("train/loss")) == 100)
    write(trackers, range(101, 103))
    trackers.close("finished")
    assert service.steps("train/loss") == list(range(1, 103))
    assert len(warnings) == 1 and service.lost == 0


def test_the_end_waits_for_a_tracker_that_hangs_for_a_while_only(service, info, monkeypatch):
    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.2)
    warnings = []
    service.hanging.set()
    trackers = opening.open_trackers(("jsonl", "wandb"), info, 0, warnings.append)
    write(trackers, range(1, 4))
    began = time.monotonic()
    trackers.close("finished")
    assert 0.1 < time.monotonic() - began < 2.0
    assert service.lost == 1 and "has not taken all records" in warnings[0]
    assert in_file(info, "loss") == [1, 2, 3]


def test_training_sends_its_records_and_a_finished_run_what_a_tracker_lacks(
    service, make_config, shared_steps, devices, tmp_path
):
    changes = {
        "log.trackers": ("jsonl", "wandb"),
        "data.validation": ("synthetic:markov:8:7",),
        "train.num_steps": 4,
        "train.log_every": 1,
        "guard.self_check": False,
    }
    config, workdir = make_config(changes), str(tmp_path)
    service.fail(times=10**6)
    assert train(config, workdir, devices[:1]) == 0
    assert service.values == {}
    service.fail(times=0)
    assert train(config, workdir, devices[:1]) == 0  # finished
    expected = {}
    for step, records in by_step(metrics.read(workdir)).items():
        for name, value in values_by_name(records).items():
            expected.setdefault(name, []).append((step, value))
    assert service.values == expected and len(expected["train/loss"]) == 4
    assert service.statuses == ["finished"] and len(expected["eval/synthetic_markov_8_7/loss"]) == 1


def test_a_run_that_diverges_is_a_failed_one_with_all_its_records(
    service, make_config, shared_steps, devices, tmp_path
):
    changes = {
        "log.trackers": ("jsonl", "wandb"),
        "train.num_steps": 6,
        "train.log_every": 1,
        "optimizer.learning_rate": 1e30,
        "optimizer.schedule.warmup_steps": 0,
        "guard.self_check": False,
    }
    with pytest.raises(Exception, match="learning_rate"):
        train(make_config(changes), str(tmp_path), devices[:1])
    info = RunInfo(str(tmp_path), "", (), "", {}, {})
    assert service.statuses == ["failed"]
    assert service.steps("train/seconds") == in_file(info, "seconds") != []


@pytest.mark.parametrize(
    "names, message",
    [
        (
            ("jsonl", "wandbb"),
            r"config.log.trackers\[1\] \('wandbb'\) must be one of .*did you mean",
        ),
        (("wandb",), r"config.log.trackers \(\('wandb',\)\) must have 'jsonl'"),
        (
            ("jsonl", "mlflow"),
            "config.log.trackers: 'mlflow' needs the package mlflow: pip install",
        ),
    ],
)
def test_trackers_that_cannot_be_are_refused_before_anything_is_compiled(
    names, message, make_config, devices, tmp_path, monkeypatch
):
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train(make_config({"log.trackers": names}), str(workdir), devices[:1])
    assert not workdir.exists()


def test_a_config_from_before_there_were_trackers_has_those_it_had(make_config):
    text = conversion.to_json(make_config())
    for old, names in (("true", ("jsonl", "tensorboard")), ("false", ("jsonl",))):
        start = text.index('"trackers": [')
        stop = text.index("]", start) + 1
        before = text[:start] + f'"tensorboard": {old}' + text[stop:]
        assert conversion.from_json(before).log.trackers == names
