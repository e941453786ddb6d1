"""Metrics of a run: their times, their means, and what a kill leaves of them."""

import io
import json
import math
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.telemetry.deferred import DeferredMetrics, StepResult
from lm.telemetry.metrics import means, read, short_names
from lm.telemetry.progress import Progress, format_duration, format_quantity
from lm.telemetry.scalars import Scalars
from lm.telemetry.trackers.local import JsonLines, TensorBoard
from lm.telemetry.trackers.opening import Trackers
from lm.telemetry.writers import MetricsWriter


def make_writer(folder, *, first_step=0, tensorboard=False, active=True, **changes):
    options = {"num_steps": 100, "every": 2, "flops_per_token": 10.0, "peak_flops": None}
    trackers = [JsonLines(str(folder), first_step)] if active else []
    trackers += [TensorBoard(str(folder))] if active and tensorboard else []
    return MetricsWriter(Trackers(trackers) if active else None, **{**options, **changes})


def finished(done, tokens, loss, *, filled=None, grad_norm=1.0, bad=False, seconds=0.1):
    """The step that ended at `done`, with a mean loss of `loss` over `tokens` scored tokens of
    `filled`, by default of as many.
    """
    sums = {"loss": tokens * loss, "accuracy": tokens * 0.5, "tokens": float(tokens)}
    info = {"grad_norm": grad_norm, "bad": bad, "filled": tokens if filled is None else filled}
    return StepResult(done - 1, sums, info, None, seconds)


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


def test_values_of_a_step_are_read_when_the_next_one_is_under_way():
    deferred = DeferredMetrics()
    assert deferred.push(0, {"loss": np.float32(2)}, {"bad": np.bool_(False)}) == []
    [first] = deferred.push(1, {"loss": Unready()}, {})
    assert (first.step, first.sums, first.bad) == (0, {"loss": 2.0}, False)
    with pytest.raises(AssertionError, match="read before"):
        deferred.push(2, {}, {})


def test_the_first_step_and_those_after_a_pause_have_no_time():
    deferred, found = DeferredMetrics(), []
    for step in range(6):
        found += deferred.push(step, {}, {"bad": False})
        time.sleep(0.05)
        if step == 2:
            found += deferred.flush()
            time.sleep(0.5)
            deferred.resume()
    found += deferred.flush()
    assert [f.step for f in found] == list(range(6))
    assert found[0].seconds is None
    assert all(0.04 < f.seconds < 0.3 for f in found[1:])


def test_work_of_the_host_is_the_time_outside_of_waiting():
    deferred, found = DeferredMetrics(), []
    for step in range(3):
        with deferred.waiting():
            time.sleep(0.2)  # for data
        time.sleep(0.05)  # on a disk
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass
        found += deferred.push(step, {}, {"bad": False})
    first, second = found
    assert first.host_seconds is None and first.host_cpu_seconds is None
    assert second.seconds > 0.3
    assert 0.1 < second.host_seconds < second.seconds - 0.19
    assert 0.05 < second.host_cpu_seconds < 0.1


def test_a_window_is_written_when_it_is_full_and_at_the_end_of_the_run(tmp_path):
    writer = make_writer(tmp_path, every=2, num_steps=5)
    for done in (1, 2, 3, 4, 5):
        writer.train(finished(done, 4, 1.0))
    assert [record["step"] for record in read(str(tmp_path))] == [2, 4, 5]


def test_means_over_a_window_weigh_every_token_alike(tmp_path):
    writer = make_writer(tmp_path, every=3)
    steps = [(1, 8.0), (1000, 2.0), (10, 5.0)]
    for step, (tokens, loss) in enumerate(steps, start=1):
        writer.train(finished(step, tokens, loss, grad_norm=float(step)), learning_rate=0.1 * step)
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
        writer.train(finished(step, 2, float(step)))
    writer.close()
    assert [record["loss"] for record in read(str(tmp_path))] == [1.5, 3.5, 5.5]


def test_speed_is_that_of_the_steps_with_a_time(tmp_path):
    writer = make_writer(tmp_path, every=4, peak_flops=1e6)
    for step, spent in enumerate((None, 0.2, None, 0.3), start=1):
        writer.train(finished(step, 1000, 1.0, seconds=spent))
    [record] = read(str(tmp_path))
    assert record["seconds"] == pytest.approx(0.5)
    assert record["tokens_per_second"] == pytest.approx(4000)
    assert record["mfu"] == pytest.approx(4000 * 10 / 1e6)


def test_speed_and_mfu_count_the_tokens_that_were_computed_not_the_scored_ones(tmp_path):
    """A masked model scores 15% of its tokens and multiplies all of them; an update that was
    skipped took its time for its tokens too.
    """
    writer = make_writer(tmp_path, every=2, peak_flops=1e6)
    writer.train(finished(1, 150, 1.0, filled=1000, seconds=0.1))
    writer.train(finished(2, 150, math.nan, filled=1000, seconds=0.1, bad=True))
    [record] = read(str(tmp_path))
    assert record["tokens"] == 150
    assert record["tokens_per_second"] == pytest.approx(10_000)
    assert record["mfu"] == pytest.approx(10_000 * 10 / 1e6)


def test_steps_that_were_not_applied_are_counted_and_stay_out_of_the_means(tmp_path):
    writer = make_writer(tmp_path, every=3)
    writer.train(finished(1, 4, 2.0, grad_norm=7.0))
    writer.train(finished(2, 4, math.nan, bad=True))
    writer.train(finished(3, 4, math.inf, bad=True))
    for step in (4, 5, 6):
        writer.train(finished(step, 4, math.nan, bad=True))
    first, second = read(str(tmp_path))
    assert (first["loss"], first["grad_norm"], first["skipped"]) == (2.0, 7.0, 2)
    assert second["skipped"] == 3 and "loss" not in second


def test_resuming_drops_the_steps_that_will_be_done_again(tmp_path):
    writer = make_writer(tmp_path)
    for step in range(1, 9):
        writer.train(finished(step, 2, float(step)))
        if step == 6:
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
        writer.train(finished(step, 2, 10.0 * step))
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


@pytest.fixture
def accumulator(monkeypatch):
    """TensorBoard's reader of a folder as it is without TensorFlow, whose import takes seconds."""
    name = "tensorboard.compat.notf"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator


def test_tensorboard_reads_what_was_written(tmp_path, accumulator):
    writer = make_writer(tmp_path, tensorboard=True)
    for step in range(1, 5):
        writer.train(finished(step, 2, float(step)))
    writer.eval(4, {"held_out": {"loss": 3.25}})
    writer.close()
    events = accumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(2, 1.5), (4, 3.5)]
    [event] = events.Scalars("eval/held_out/loss")
    assert (event.step, event.value) == (4, 3.25)
    assert abs(event.wall_time - time.time()) < 60


def test_two_writers_of_one_second_have_two_event_files(tmp_path, monkeypatch):
    monkeypatch.setattr("lm.telemetry.trackers.local.time.time", lambda: 1.7e9)
    for _ in range(2):
        make_writer(tmp_path, tensorboard=True).close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_two_runs_with_their_stores_elsewhere_share_the_tags_of_tensorboard(tmp_path, accumulator):
    tags = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        writer = make_writer(tmp_path / place, tensorboard=True)
        paths = [str(tmp_path / place / corpus / "validation") for corpus in ("books", "code")]
        writer.eval(4, {path: {"loss": float(i)} for i, path in enumerate(paths)})
        writer.close()
        assert [r["source"] for r in read(str(tmp_path / place))] == paths
        events = accumulator(str(tmp_path / place / "tensorboard")).Reload()
        tags.append(events.Tags()["scalars"])
        assert events.Scalars("eval/code/validation/loss")[0].value == 1.0
    assert tags[0] == tags[1] == ["eval/books/validation/loss", "eval/code/validation/loss"]


def test_sources_are_called_by_the_fewest_last_parts_that_tell_them_apart():
    def names(*sources):
        return list(short_names(sources).values())

    assert names("/data/books/validation") == ["validation"]
    assert names("gs://bucket/books/validation/") == ["validation"]
    assert names("a/x/val", "b/x/val", "b/test") == ["a/x/val", "b/x/val", "test"]
    assert names("/val", "/a/val", "val") == ["/val", "a/val", "val"]  # one ends another
    assert names("/a/val", "/a/val/") == ["/a/val", "/a/val/"]


def test_a_writer_that_is_not_active_writes_nothing(tmp_path):
    writer = make_writer(tmp_path, active=False, tensorboard=True)
    for step in (1, 2):
        writer.train(finished(step, 2, 1.0))
    writer.eval(2, {"held_out": {"loss": 3.25}})
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
        progress.show("stays", keep=True)
        progress.show("four", final=True)
    assert terminal.getvalue().count("\r") == 6
    assert file.getvalue() == "one\nkept\nfour\n"
    assert on_screen(terminal) == ["kept", "stays", "four", ""]


def on_screen(terminal):
    """The lines that a terminal shows: each as it was last drawn."""
    return [line.rpartition("\x1b[K")[2] for line in terminal.getvalue().split("\n")]


def progress_of(stream, folder, *, steps=5, **changes):
    """The writer of a run whose progress goes to `stream`, after some steps of 1,000 tokens."""
    writer = make_writer(folder, num_steps=20, **changes)
    writer.progress = Progress(stream, pause=0.0)
    for done in range(1, steps + 1):
        spent = None if done == 1 else 0.5
        step = finished(done, 1000, 2.0 + done, grad_norm=0.5 * done, seconds=spent)
        writer.train(step, **({"learning_rate": 3e-4} if writer.is_due(done) else {}))
    return writer


def test_a_terminal_keeps_a_line_for_each_window_and_draws_every_step_below(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    progress_of(terminal, tmp_path, every=2)
    first, second, live = on_screen(terminal)
    assert first == (
        "step 2/20 · loss 3.5000 · 2k tok/s · 9s left · grad norm 1 · lr 0.0003 · 20kFLOP/s"
    )
    assert second.startswith("step 4/20 · loss 5.5000 · 2k tok/s · 8s left · grad norm 2 ")
    assert live.startswith("step 5/20 · loss 7.0000 · 2k tok/s · 8s left · grad norm 2.5 ")


def test_in_a_pipe_there_is_a_plain_line_for_each_window(tmp_path):
    file = io.StringIO()
    progress_of(file, tmp_path, every=2)
    assert [line[:9] for line in file.getvalue().splitlines()] == ["step 2/20", "step 4/20"]
    assert "\r" not in file.getvalue() and "\x1b" not in file.getvalue()


def test_a_line_that_is_too_long_for_the_terminal_loses_its_last_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    progress_of(terminal, tmp_path, every=4, steps=3)
    assert on_screen(terminal) == ["step 3/20 · loss 5.0000 · 2k tok/s"]


def test_a_window_without_a_timed_step_has_no_speed(tmp_path):
    terminal = Terminal()
    progress_of(terminal, tmp_path, every=1, steps=1, peak_flops=1e6).close()
    assert on_screen(terminal)[0] == "step 1/20 · loss 3.0000 · grad norm 0.5 · lr 0.0003"
    [record] = read(str(tmp_path))
    assert not {"tokens_per_second", "mfu"} & record.keys()


def test_records_are_json_lines(tmp_path):
    writer = make_writer(tmp_path, every=1)
    writer.train(finished(1, 2, 1.0))
    writer.close()
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["kind"] == "train"


def test_figures_are_short():
    assert [format_quantity(v) for v in (999.9, 999_999, -999_999_999)] == ["1k", "1M", "-1G"]
    assert [format_quantity(v) for v in (0.5, 999, 1234, 1.234567e6, 5e9, 2e13)] == [
        "0.5",
        "999",
        "1.23k",
        "1.23M",
        "5G",
        "20T",
    ]
    assert [format_duration(v) for v in (12.2, 200, 3725)] == ["12s", "3m20s", "1h02m"]


def test_packed_scalars_are_the_arrays_that_were_packed():
    arrays = {
        "loss": jnp.float32(jnp.nan),
        "norm": jnp.float32(-0.0),
        "bad": jnp.bool_(True),
        "filled": jnp.int32(-3),
        "records": jnp.array([2**32 - 1, 7], jnp.uint32),
    }
    packed = jax.jit(Scalars.pack)(arrays)
    assert len(jax.tree.leaves(packed)) == 1
    for held in (packed, jax.device_get(packed)):
        assert held.keys() == arrays.keys()
        for name, x in arrays.items():
            assert held[name].dtype == x.dtype and held[name].shape == x.shape
            assert np.asarray(held[name]).tobytes() == np.asarray(x).tobytes()
    with pytest.raises(KeyError):
        packed["other"]
    with pytest.raises(TypeError, match="float16 is not of 4 bytes"):
        Scalars.pack({"x": jnp.float16(1)})
