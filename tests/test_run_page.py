"""The page of a run: its data, its size, and what a browser makes of it."""

import base64
import gzip
import json
import math
import pathlib
import re
import time

import chromium
import numpy as np
import pytest

from lm.exit_codes import Exit
from lm.run_page import charts, content, page, thinning, timeline
from lm.run_page.folder import FAILED, FINISHED, RUNNING, STOPPED, UNKNOWN, NoRun, RunFolder
from lm.storage import files
from lm.telemetry import goodput, jsonl
from lm.training import loop
from lm.training.experiment import Experiment

EVIL = "</script><img src=x onerror=\"document.title='owned'\"><!--plotly--> & 'quoted'"
in_browser = pytest.mark.skipif(chromium.BROWSER is None, reason=chromium.MISSING)


@pytest.fixture(scope="module")
def killed(make_config, devices, tmp_path_factory):
    """The folder of a run in bfloat16 that failed at step 15 and began again at step 10."""
    folder = tmp_path_factory.mktemp("runs") / "killed"
    changes = {
        "model.dtype": "bfloat16",
        "train.num_steps": 24,
        "train.log_every": 1,
        "train.eval_every": 8,
        "data.validation": ("synthetic:markov:40:7",),
        "checkpoint.at": (10,),
        "log.profile_start": 17,
        "log.profile_steps": 2,
        "guard.self_check": False,
    }
    make = Experiment.make_global_batch
    count = 0

    def fail_once(self, batch):
        nonlocal count
        count += 1
        if count == 16:
            raise RuntimeError("INTERNAL: the device is gone")
        return make(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "make_global_batch", fail_once)
        with pytest.raises(RuntimeError):
            loop.train(make_config(changes), str(folder), devices[:1])
        assert loop.train(make_config(changes), str(folder), devices[:1]) == 0
    (folder / "samples.txt").write_text(f"--- sample 1\n{EVIL}\n")
    layers = {"gradient_norm": {"layers.mlp": [0.1, 0.2], "embedding": 3.0}}
    lines = [jsonl.line({"step": step, **layers}) for step in range(1, 25)]
    (folder / "layers.jsonl").write_text("".join(lines))
    return folder


def write_run(folder, steps=40, **changes):
    """A run's files of the lines that training writes, with a spike of the loss at step 21."""
    rows, began = [], 1.7e9
    for step in range(1, steps + 1):
        values = {"loss": 9.0 if step == 21 else 4 / math.sqrt(step), "grad_norm": 0.5, **changes}
        rows.append({"step": step, "kind": "train", "tokens": 100.0, **values,
                     "learning_rate": 1e-3, "tokens_seen": 100 * step, "seconds": 0.5,
                     "tokens_per_second": 200.0 + step})  # fmt: skip
    rows.append({"step": steps, "kind": "eval", "source": "data/validation", "tokens": 50.0,
                 "loss": 1.5, "accuracy": 0.25, "accuracy_stderr": 0.01})  # fmt: skip
    seconds = {"start": 10.0, "step": 0.5 * steps}
    end = {"attempt": 1, "ended": "2023-11-14T22:20:00+00:00", "code": 0, "error": ""}
    lines = {
        "metrics": rows,
        "goodput": [
            {"began": began, "wrote": began + 10, "first_step": 0, "step": 0,
             "seconds": {"start": 10.0}},
            {"began": began, "wrote": began + 10 + 0.5 * steps, "first_step": 0, "step": steps,
             "seconds": seconds},
        ],
        "attempts": [
            {"attempt": 1, "began": "2023-11-14T22:13:25+00:00", "host": "n1", "processes": 1,
             "from_step": 0, "ledger": 0},
            end,
        ],
    }  # fmt: skip
    for name, records in lines.items():
        text = "".join(map(jsonl.line, records))
        files.write_atomically(f"{folder}/{name}.jsonl", text)
    config = {"optimizer": {"learning_rate": changes.get("learning_rate", 1e-3)}}
    files.write_atomically(f"{folder}/config.json", json.dumps(config | {"seed": 0}))


def data_of(path):
    """The data of a page."""
    packed = re.search(r'id="data">([^<]*)<', files.read_bytes(path).decode())
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


# ---- thinning ----


def test_a_long_curve_keeps_a_spike_of_one_step_and_the_means_of_all():
    steps, values = np.arange(100_000), np.sin(np.arange(100_000) / 5000)
    values[12_345], values[77_777] = 50.0, -50.0
    curve = thinning.curve(steps, values, 500)
    assert len(curve["x"]) <= 1002 and len(curve["mx"]) == 500
    points = dict(zip(curve["x"], curve["y"], strict=True))
    assert points[12_345] == 50.0 and points[77_777] == -50.0
    assert curve["x"] == sorted(curve["x"]) and curve["x"][-1] == 99_999
    assert np.mean(curve["my"]) == pytest.approx(values.mean(), abs=1e-4)
    short = thinning.curve(steps[:10], values[:10], 500)
    assert "mx" not in short and short["x"] == list(range(10))
    assert thinning.curve([1, 2, 3], [1.0, math.nan, math.inf])["x"] == [1]


def test_a_heat_map_keeps_the_largest_entry_of_each_column():
    values = np.random.default_rng(0).random((1000, 3))
    values[417, 1] = -7.0
    found = thinning.heat_map(range(1000), values, 50)
    assert len(found["x"]) == 50 and {len(row) for row in found["z"]} == {50}
    assert found["z"][1][417 * 50 // 999] == -7.0
    assert min(found["z"][0]) > 0.5  # the largest of twenty, not their mean


# ---- wall time ----


def test_the_time_line_adds_up_to_goodputs_report(killed):
    records = RunFolder(str(killed)).goodput
    line, report = timeline.make(records), goodput.report(records)
    assert len({r["began"] for r in records}) == 2
    assert report.losses["redone"] > 0 and report.losses["down"] > 0
    wanted = {"step": report.productive, **report.losses}
    drawn = {phase: sum(line["bins"].get(phase, [0.0])) for phase in wanted}
    assert drawn["redone"] > 0  # their own time; the report takes the process's mean time of a step
    for sums in (wanted, drawn):
        sums["step"] += sums.pop("redone")
    assert drawn == pytest.approx(wanted, rel=0.02, abs=0.02)
    width = line["wall"] / timeline.BINS
    together = np.sum([bins for bins in line["bins"].values()], 0)
    assert together.max() < 1.1 * width and together.sum() == pytest.approx(line["wall"], rel=0.02)


def test_time_between_processes_and_steps_done_again_lie_where_they_were():
    keys = "began", "wrote", "first_step", "step", "seconds"
    rows = [
        (0.0, 60.0, 0, 0, {"start": 60.0}),
        (0.0, 120.0, 0, 60, {"start": 60.0, "step": 60.0}),
        (180.0, 240.0, 30, 90, {"step": 60.0}),
    ]
    records = [dict(zip(keys, row, strict=True)) for row in rows]
    line = timeline.make(records)
    quarter = timeline.BINS // 4
    sums = {k: np.reshape(b, (4, quarter)).sum(1).round(1) for k, b in line["bins"].items()}
    assert sums["start"].tolist() == [60, 0, 0, 0] and sums["down"].tolist() == [0, 0, 60, 0]
    assert sums["redone"].tolist() == [0, 30, 0, 0] and sums["step"].tolist() == [0, 30, 0, 60]


@pytest.mark.parametrize(
    "end, wrote, kind",
    [
        ({"code": 0, "ended": "2026-01-01T00:00:00+00:00"}, 0, FINISHED),
        ({"code": int(Exit.TERMINATED), "ended": "2026-01-01T00:00:00+00:00"}, 0, STOPPED),
        ({"code": int(Exit.DIVERGED), "ended": "2026-01-01T00:00:00+00:00"}, 0, FAILED),
        ({}, 10, RUNNING),
        ({}, 10_000, UNKNOWN),
    ],
)
def test_the_state_of_a_run_follows_from_its_last_attempt(tmp_path, end, wrote, kind):
    now = 1.8e9
    began = {"attempt": 1, "began": "2020-01-01T00:00:00+00:00", "from_step": 0}
    (tmp_path / "attempts.jsonl").write_text(jsonl.line(began) + jsonl.line({"attempt": 1, **end}))
    (tmp_path / "goodput.jsonl").write_text(jsonl.line({"wrote": now - wrote}))
    assert RunFolder(str(tmp_path)).state(now).kind == kind


# ---- content ----


def test_the_page_of_a_run_has_all_that_its_folder_says(killed):
    found = content.of_run(RunFolder(str(killed)))
    assert found["state"]["kind"] == FINISHED
    tiles = {label: value for label, value, _ in found["summary"]}
    assert tiles["steps"] == "24 of 24" and tiles["devices"] == "1 × cpu"
    train, evals = found["charts"]["loss"]
    assert train["x"] == list(range(1, 25)) and evals["x"] == [8, 16, 24]
    records = RunFolder(str(killed)).train
    assert train["y"] == pytest.approx([r["loss"] for r in records], rel=1e-5)
    assert [s["from"] for s in found["starts"]] == [0, 10]
    assert not found["starts"][0]["good"] and "the device is gone" in found["starts"][0]["error"]
    assert [c["step"] for c in found["checkpoints"]] == [24, 10]
    assert all(c["verified"] and not c["fault"] for c in found["checkpoints"])
    [source] = found["data"]
    assert source["share"] == 1 and source["epochs"] == source["planned"] > 0
    [sample] = found["samples"]
    assert sample == {"step": 24, "title": "sample 1", "text": EVIL}
    by_group, mlp = found["heat"]
    assert by_group["rows"] == ["embedding"] and mlp["rows"] == ["layer 0", "layer 1"]
    assert mlp["z"] == [[0.1] * 24, [0.2] * 24]
    [profile] = found["profiles"]
    assert profile["steps"] == "17-18" and sum(profile["shares"].values()) == pytest.approx(1)
    assert any(row["source"].startswith("lm/") for row in profile["operations"])
    defaults = content.explained(RunFolder(str(killed)).config)
    assert defaults["train.log_every"][0] != found["config"]["train.log_every"] == "1"
    assert defaults["checkpoint.at"][0] == "()" and found["config"]["checkpoint.at"] == "(10,)"


def test_what_went_wrong_is_among_the_warnings(tmp_path):
    write_run(tmp_path, skipped=2)
    evidence = {"step": 7, "verdict": "data", "reason": "it repeats", "worst_rows": [],
                "first": {"bad": True, "loss": 3.0, "grad_norm": "inf"}}  # fmt: skip
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "step-7.json").write_text(json.dumps(evidence))
    for folder in ("bad_checkpoints/30", "stacks/a"):
        (tmp_path / folder).mkdir(parents=True)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(jsonl.line({"step": 41, "kind": "train", "loss": math.nan}))
    titles = [w["title"] for w in content.of_run(RunFolder(str(tmp_path)))["warnings"]]
    assert titles == [
        "Step 7 was bad, because of: data",
        "1 checkpoint did not verify",
        "1 value not finite",
        "80 updates skipped",
        "The run has hung",
    ]


def test_standard_errors_are_on_the_curve_and_in_the_table(tmp_path):
    write_run(tmp_path)
    run = RunFolder(str(tmp_path))
    [trace] = charts.of_run(run)["accuracy"]
    assert trace["y"] == [0.25] and trace["error"] == [0.01]
    assert "accuracy_stderr" not in charts.of_run(run)
    rows = {row["metric"]: row for row in content.evaluations(run.evals)}
    assert rows["accuracy"]["error"] == 0.01 and rows["loss"]["error"] is None


def test_heat_maps_are_in_the_order_of_steps_and_a_step_done_again_counts_once():
    def record(step, value):
        return {"step": step, "norm": {"mlp": [value, "NaN"]}, "loss_by_position": {"4-7": 1.0}}

    positions, norms = charts.heat_maps([record(2, 1.0), record(4, 9.0), record(4, 3.0)][::-1])
    assert norms["x"] == [2, 4] and norms["z"] == [[1, 9], [None, None]]
    assert norms["rows"] == ["layer 0", "layer 1"] and positions["rows"] == ["4-7"]


def test_a_task_without_a_loss_hides_no_validation_loss(tmp_path):
    write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(jsonl.line({"step": 41, "kind": "eval", "source": "task", "acc": 0.5}))
    found = content.of_run(RunFolder(str(tmp_path)))
    assert found["row"]["validation loss"] == 1.5
    assert ["validation loss", "1.5000", "nats per token, after step 40"] in found["summary"]
    assert {row["source"] for row in found["evals"]} == {"task", "validation"}


def test_a_page_is_made_in_a_bucket_as_on_a_disk(folder):
    write_run(f"{folder}/run")
    path = page.write([f"{folder}/run"])
    assert path == f"{folder}/run/report.html"
    [run] = data_of(path)["runs"]
    assert run["charts"]["loss"][0]["y"][20] == 9 and run["state"]["kind"] == FINISHED


def test_several_runs_share_a_page_and_their_configs_are_compared(tmp_path):
    for i, rate in enumerate((1e-3, 3e-3, 1e-2)):
        write_run(tmp_path / f"run{i}", learning_rate=rate)
    runs = [str(tmp_path / f"run{i}") for i in range(3)]
    with pytest.raises(ValueError, match="--out"):
        page.write(runs)
    found = data_of(page.write(runs, str(tmp_path / "all.html")))
    rates = [r["config"]["optimizer.learning_rate"] for r in found["runs"]]
    assert rates == ["0.001", "0.003", "0.01"] and found["sweep"] is None
    assert [r["row"]["validation loss"] for r in found["runs"]] == [1.5] * 3
    with pytest.raises(NoRun, match="holds no run"):
        page.make([str(tmp_path)])


def write_sweep(folder):
    """A sweep of three runs, one of which diverged; returns the lines of its table."""
    files.write_atomically(folder / "sweep.json", json.dumps({"runs": None}))
    rows = []
    for name, rate, loss in (("a", 1e-3, 2.0), ("b", 1e-2, None), ("c", 1e-4, 2.5)):
        write_run(folder / name, learning_rate=rate)
        status = "finished" if loss else "diverged"
        row = {"run": name, "status": status, "optimizer.learning_rate": rate}
        rows.append({**row, "parameters": 10, "loss": loss, "message": EVIL})
    return rows


def test_a_sweeps_page_has_its_table_and_its_diverged_runs(tmp_path):
    rows = write_sweep(tmp_path)
    found = data_of(page.write([str(tmp_path)]))  # while it is under way
    assert found["sweep"]["axes"] == ["optimizer.learning_rate"]
    assert [row["values"] for row in found["sweep"]["rows"]] == [[0.001], [0.01], [0.0001]]
    assert [row["loss"] for row in found["sweep"]["rows"]] == [1.5] * 3
    (tmp_path / "sweep.jsonl").write_text("".join(map(jsonl.line, rows)))
    found = data_of(page.write([str(tmp_path)]))
    assert found["title"] == tmp_path.name and found["count"] == 3
    assert found["sweep"]["axes"] == ["optimizer.learning_rate"]
    ends = [(r["status"], r["loss"]) for r in found["sweep"]["rows"]]
    assert ends == [("finished", 2), ("diverged", None), ("finished", 2.5)]


def test_of_many_runs_the_page_has_the_curves_of_the_best(tmp_path, monkeypatch):
    write_sweep(tmp_path)
    monkeypatch.setattr(page, "MAX_CURVES", 2)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write(jsonl.line({"step": 40, "kind": "eval", "source": "x", "loss": 99.0}))
    found = data_of(page.write([str(tmp_path)]))
    assert [run["name"] for run in found["runs"]] == ["a", "c"] and found["count"] == 3


def test_a_page_of_100_000_steps_is_small_and_quick(tmp_path):
    write_run(tmp_path, steps=100_000, host_seconds=0.001, host_cpu_seconds=0.001, mfu=0.4)
    values = {"layers.attention": [0.1 * i for i in range(48)], "layers.mlp": [0.2] * 48}
    with (tmp_path / "layers.jsonl").open("w") as file:
        for step in range(50, 100_001, 500):
            names = ("gradient_norm", "weight_norm", "update_ratio", "activation_rms")
            file.write(jsonl.line({"step": step, **dict.fromkeys(names, values)}))
    began = time.process_time()
    path = page.write([str(tmp_path)])
    assert time.process_time() - began < 20
    assert files.stat(path).size < 3_000_000
    loss = data_of(path)["runs"][0]["charts"]["loss"][0]
    assert 9 in loss["y"] and len(loss["x"]) <= 2 * thinning.BUCKETS + 2


def test_a_run_is_not_failed_by_its_page(tmp_path, capsys):
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("no json\n")
    page.write_at_end(str(tmp_path))
    assert "no report.html: JSONDecodeError" in capsys.readouterr().err
    write_run(tmp_path)
    for code in (Exit.TERMINATED, Exit.LOCK_LOST, Exit.NO_STORAGE):
        page.write_at_end(str(tmp_path), code)
    assert not (tmp_path / "report.html").exists()
    page.write_at_end(str(tmp_path), Exit.DIVERGED)
    assert (tmp_path / "report.html").exists()


# ---- in a browser ----


def test_no_text_of_a_run_is_markup_of_the_page(killed):
    text = page.make([str(killed)])
    assert "onerror" not in text.replace(page._plotly(), "")
    assert text.count("</script>") == 3


@in_browser
def test_a_browser_draws_every_section_without_an_error_and_shows_text_as_text(killed, tmp_path):
    path = tmp_path / "report.html"
    page.write([str(killed)], str(path))
    probe = """
      const plots = [...document.querySelectorAll(".js-plotly-plot")];
      return {
        sections: [...document.querySelectorAll("section")].map((s) => s.id),
        sample: document.querySelector("#samples pre").textContent,
        title: document.title, images: document.querySelectorAll("img").length,
        traces: plots.map((p) => p.data.length),
        heat: plots.filter((p) => p.data[0].type === "heatmap").length,
        starts: document.querySelectorAll("#time tbody tr").length,
        reached: await fetch("data:,x").then(() => true, () => false),
      };"""
    found = chromium.look(path, probe, tmp_path)
    assert found["ready"] == "yes"
    value = found["value"]
    # the probe's own request is what the page's policy refuses, and may report by then
    assert not {*found["errors"]} - {"blocked: data"} and value["reached"] is False
    wanted = "summary curves evaluations time layers samples data checkpoints profile config"
    assert [s for s in value["sections"] if s != "warnings"] == wanted.split()
    assert value["sample"] == EVIL and value["title"] == "killed" and value["images"] == 0
    assert all(value["traces"]) and value["heat"] == 2 and value["starts"] == 2


@in_browser
def test_a_zoom_reaches_all_curves_and_smoothing_changes_them(tmp_path):
    write_run(tmp_path / "run", steps=200)
    page.write([str(tmp_path / "run")], str(tmp_path / "report.html"))
    probe = """
      const plots = [...document.querySelectorAll("#curves .js-plotly-plot")];
      const bold = () => Math.max(...plots[0].data[1].y);
      const before = bold();
      await Plotly.relayout(plots[0], { "xaxis.range[0]": 50, "xaxis.range[1]": 60 });
      await pause(300);
      const ranges = plots.filter((p) => p.offsetParent).map((p) => p.layout.xaxis.range);
      const slider = document.querySelector("input[type=range]");
      slider.value = 0.95;
      slider.dispatchEvent(new Event("input"));
      await pause(300);
      const select = document.querySelector("#curves select");
      select.value = "tokens";
      select.dispatchEvent(new Event("change"));
      await pause(300);
      return { ranges, before, after: bold(), raw: Math.max(...plots[0].data[0].y),
               tokens: plots[0].data[0].x.at(-1) };"""
    value = chromium.look(tmp_path / "report.html", probe, tmp_path)["value"]
    assert len(value["ranges"]) > 3 and all(r == [50, 60] for r in value["ranges"])
    assert value["raw"] == 9 and value["after"] < value["before"] < 9
    assert value["tokens"] == 20_000


@in_browser
def test_a_click_on_a_title_sorts_runs_by_number(tmp_path):
    for name, rate in (("a", 0.5), ("b", 20.0), ("c", 3.0)):
        write_run(tmp_path / name, learning_rate=rate)
    runs = [str(tmp_path / name) for name in "abc"]
    page.write(runs, str(tmp_path / "report.html"))
    probe = """
      const heads = [...document.querySelectorAll("#runs th")];
      const head = heads.find((h) => h.textContent === "learning rate");
      const rows = () => [...document.querySelectorAll("#runs tbody tr")];
      const order = () => rows().map((r) => r.cells[0].textContent);
      head.click(); const up = order(); head.click(); const down = order();
      const select = document.querySelector("#run select");
      select.value = "2";
      select.dispatchEvent(new Event("change"));
      return { up, down, shown: document.querySelectorAll("#summary").length };"""
    found = chromium.look(tmp_path / "report.html", probe, tmp_path)
    assert found["errors"] == []
    assert found["value"] == {"up": ["a", "c", "b"], "down": ["b", "c", "a"], "shown": 1}


@in_browser
def test_a_sweep_is_drawn_in_parallel_coordinates_and_slices(tmp_path):
    rows = write_sweep(tmp_path)
    (tmp_path / "sweep.jsonl").write_text("".join(map(jsonl.line, rows)))
    path = page.write([str(tmp_path)], str(tmp_path / "report.html"))
    probe = """
      const find = (id) => document.querySelector(id + " .plot");
      const [lines, slice] = ["#parallel", "#slices"].map(find);
      return { kind: lines.data[0].type, dimensions: lines.data[0].dimensions.map((d) => d.values),
               dots: slice.data[0].y, crosses: slice.data[1].x,
               first: document.querySelector("#ranking tbody tr").cells[0].textContent };"""
    found = chromium.look(pathlib.Path(path), probe, tmp_path)
    assert found["errors"] == []
    assert found["value"] == {
        "kind": "parcoords",
        "dimensions": [[-3, -4], [2, 2.5]],  # learning rates by their logarithms
        "dots": [2, 2.5],
        "crosses": [0.01],
        "first": "a",
    }
