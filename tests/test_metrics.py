"""What a run writes down: when, with which means, and what is left of it after a kill."""

import io
import json
import math
import time

import numpy as np
import pytest

from lm.metrics import Progress, Writer, means, quantity, read, seconds


def make_writer(folder, **changes):
    options = {
        "first_step": 0,
        "num_steps": 100,
        "every": 2,
        "flops_per_token": 10.0,
        "peak_flops": None,
        "tensorboard": False,
    }
    return Writer(str(folder), **{**options, **changes})


def sums(tokens, loss, **more):
    """Sums of a step whose mean loss is `loss`."""
    values = {"loss": tokens * loss, "accuracy": tokens * 0.5, "tokens": tokens, "grad_norm": 1.0}
    return {name: np.float32(value) for name, value in {**values, **more}.items()}


class Unready:
    """A value that must not be read yet."""

    def __array__(self, *args, **kwargs):
        raise AssertionError("read before the next step was dispatched")


def test_means_divide_by_tokens_once():
    assert means({"loss": 6.0, "accuracy": 3.0, "tokens": 12.0}) == {
        "loss": 0.5,
        "accuracy": 0.25,
        "tokens": 12.0,
    }
    assert means({"loss": 0.0, "tokens": 0.0}) == {"loss": 0.0, "tokens": 0.0}


def test_metrics_of_a_step_are_written_when_the_next_one_is_under_way(tmp_path):
    writer = make_writer(tmp_path, every=1)
    writer.train(1, sums(4, 2.0))
    assert read(str(tmp_path)) == []
    writer.train(2, {"loss": Unready(), "tokens": Unready()})
    assert [record["step"] for record in read(str(tmp_path))] == [1]
    with pytest.raises(AssertionError, match="read before"):
        writer.train(3, sums(4, 2.0))


def test_closing_writes_the_last_step(tmp_path):
    writer = make_writer(tmp_path, every=2)
    for step in (1, 2, 3, 4):
        writer.train(step, sums(4, float(step)))
    assert [record["step"] for record in read(str(tmp_path))] == [2]
    writer.close()
    assert [record["step"] for record in read(str(tmp_path))] == [2, 4]


def test_means_over_a_window_weigh_every_token_alike(tmp_path):
    writer = make_writer(tmp_path, every=3)
    steps = [(1, 8.0), (1000, 2.0), (10, 5.0)]
    for step, (tokens, loss) in enumerate(steps, start=1):
        writer.train(step, sums(tokens, loss, grad_norm=float(step)), learning_rate=0.1 * step)
    writer.close()
    [record] = read(str(tmp_path))
    assert record["loss"] == pytest.approx((8 + 2000 + 50) / 1011)
    assert record["accuracy"] == pytest.approx(0.5)
    assert record["tokens"] == 1011
    assert record["grad_norm"] == 3.0  # the last step's: norms don't add up
    assert record["learning_rate"] == pytest.approx(0.3)


def test_windows_do_not_overlap(tmp_path):
    writer = make_writer(tmp_path, every=2)
    for step in range(1, 7):
        writer.train(step, sums(2, float(step)))
    writer.close()
    assert [record["loss"] for record in read(str(tmp_path))] == [1.5, 3.5, 5.5]


def test_a_window_is_not_cut_by_a_pause(tmp_path):
    writer = make_writer(tmp_path, every=4)
    for step in range(1, 5):
        writer.train(step, sums(2, float(step)))
        with writer.pause():
            pass
    writer.close()
    assert [record["loss"] for record in read(str(tmp_path))] == [2.5]


def test_speed_leaves_out_the_first_step_and_pauses(tmp_path):
    writer = make_writer(tmp_path, every=4, peak_flops=1e6)
    for step in range(1, 5):
        writer.train(step, sums(1000, 1.0))
        time.sleep(0.5 if step == 1 else 0.05)  # its compilation, then steps
        if step == 2:
            with writer.pause():
                time.sleep(0.5)
    writer.close()
    [record] = read(str(tmp_path))
    assert 0.05 < record["seconds"] < 0.4
    assert 2500 < record["tokens_per_second"] < 60_000
    assert record["mfu"] == pytest.approx(record["tokens_per_second"] * 10 / 1e6)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_on_record(tmp_path):
    writer = make_writer(tmp_path, every=10)
    writer.train(1, sums(4, 2.0))
    writer.train(2, sums(4, math.nan))
    with pytest.raises(FloatingPointError, match=r"loss of step 2 is nan.*learning_rate"):
        writer.train(3, sums(4, 2.0))
    [record] = read(str(tmp_path))
    assert record["step"] == 2 and math.isnan(record["loss"])


def test_resuming_drops_the_steps_that_will_be_done_again(tmp_path):
    writer = make_writer(tmp_path)
    for step in range(1, 9):
        writer.train(step, sums(2, float(step)))
        if step == 6:
            with writer.pause():
                writer.eval(6, {"held_out": {"loss": 3.0, "tokens": 7.0}})
    writer.close()
    kept = read(str(tmp_path))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "kind": "tr')  # cut by a kill
    assert read(str(tmp_path)) == kept

    writer = make_writer(tmp_path, first_step=6)
    kept = [record for record in kept if record["step"] <= 6]
    assert read(str(tmp_path)) == kept
    assert [(r["step"], r["kind"]) for r in kept][-2:] == [(6, "train"), (6, "eval")]
    for step in (7, 8):
        writer.train(step, sums(2, 10.0 * step))
    writer.close()
    [*before, last] = read(str(tmp_path))
    assert before == kept and (last["step"], last["loss"]) == (8, 75.0)


def test_evaluations_carry_their_source(tmp_path):
    writer = make_writer(tmp_path)
    writer.eval(4, {"a": {"loss": 1.0, "tokens": 5.0}, "b": {"loss": 2.0, "tokens": 6.0}})
    writer.close()
    expected = [
        {"step": 4, "kind": "eval", "source": "a", "loss": 1.0, "tokens": 5.0},
        {"step": 4, "kind": "eval", "source": "b", "loss": 2.0, "tokens": 6.0},
    ]
    assert read(str(tmp_path)) == expected


def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = make_writer(tmp_path, tensorboard=True)
    for step in range(1, 5):
        writer.train(step, sums(2, float(step)))
    with writer.pause():
        writer.eval(4, {"held_out": {"loss": 3.25}})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(2, 1.5), (4, 3.5)]
    [event] = events.Scalars("eval/held_out/loss")
    assert (event.step, event.value) == (4, 3.25)
    assert abs(event.wall_time - time.time()) < 60


def test_a_writer_that_is_not_active_writes_nothing_but_still_watches_the_loss(tmp_path):
    writer = make_writer(tmp_path, active=False, tensorboard=True)
    writer.train(1, sums(2, 1.0))
    writer.train(2, sums(2, math.inf))
    with pytest.raises(FloatingPointError, match="step 2"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_draws_over_itself_on_a_terminal_only():
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = Progress(stream, pause=1000.0)
        for text in ("one", "two", "three"):
            progress.show(text)
        progress.note("kept")
        progress.show("four", final=True)
    assert terminal.getvalue().count("\r") == 5
    assert file.getvalue() == "one\nkept\nfour\n"


def test_records_are_json_lines(tmp_path):
    writer = make_writer(tmp_path, every=1)
    writer.train(1, sums(2, 1.0))
    writer.close()
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["kind"] == "train"


def test_figures_are_short():
    assert [quantity(v) for v in (0.5, 999, 1234, 1.234567e6, 5e9, 2e13)] == [
        "0.5",
        "999",
        "1.23k",
        "1.23M",
        "5G",
        "20T",
    ]
    assert [seconds(v) for v in (12.2, 200, 3725)] == ["12s", "3m20s", "1h02m"]
