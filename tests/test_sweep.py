"""Sweeps: which runs there are, that each is done once whatever is killed, and what is reported."""

import contextlib
import csv
import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from environment import fake_devices, run_script

from lm.config import conversion
from lm.exit_codes import Exit
from lm.reliability import data_ledger, workdir_lock
from lm.scaling import run_table
from lm.scaling.sweep import cluster, pool, report, space
from lm.scaling.sweep.adaptive import Search
from lm.scaling.sweep.pool import Trial
from lm.telemetry import jsonl, metrics

ROOT = pathlib.Path(__file__).parent.parent
RATE = "optimizer.learning_rate"


# ---- the space ----


def test_axes_are_read_as_values_and_ranges():
    parse = space.parse
    assert parse("config.a.b=1,2.5,x") == space.Choice("a.b", (1, 2.5, "x"))
    assert parse("a=(1,2),(3,4)").values == ((1, 2), (3, 4))
    assert parse("a=1e-4..1:log") == space.Range("a", 1e-4, 1, True)
    assert parse("a=2..6").is_whole and not parse("a=2..6.0").is_whole
    assert parse("config=c/x.py:2,c/x.py:3").values == ("c/x.py:2", "c/x.py:3")


@pytest.mark.parametrize(
    "text", ["a", "a=", "=1", "a=2..1", "a=x..y", "a=0..1:log", "a=1,1", "a=1,'1'"]
)
def test_what_is_no_axis_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(text)):
        space.parse(text)


def test_a_grid_has_every_combination_with_every_seed_and_fold():
    points = space.grid([space.parse("a=1,2"), space.parse("b=x,y,z")])
    assert [(p["a"], p["b"]) for p in points] == list(itertools.product((1, 2), "xyz"))
    full = space.with_seeds_and_folds(points, 2, 3)
    assert len(full) == len({space.name(p) for p in full}) == 36
    assert {(p["seed"], p["fold"]) for p in full} == set(itertools.product(range(2), range(3)))


def test_random_points_differ_stay_within_and_begin_alike():
    axes = [space.parse(t) for t in ("r=1e-4..1e-1:log", "n=2..5", "k=4..64:log", "c=x,y")]
    points = space.random_points(axes, 200, seed=1)
    assert len({repr(p) for p in points}) == 200 and points[:7] == space.random_points(axes, 7, 1)
    rates = np.log10([p["r"] for p in points])
    assert rates.min() >= -4 and rates.max() <= -1 and abs(np.median(rates) + 2.5) < 0.3
    assert {p["n"] for p in points} == {2, 3, 4, 5} and {p["c"] for p in points} == {"x", "y"}
    assert all(4 <= p["k"] <= 64 and isinstance(p["k"], int) for p in points)
    with pytest.raises(ValueError, match="only 4 of 5"):
        space.random_points([space.parse("n=2..5")], 5, seed=0)


def test_axes_are_held_against_the_config_before_any_run():
    """All faults at once; a key that one of the models has is none."""
    axes = [space.parse(t) for t in ("optimizer.learing_rate=1e-3,1e-2", "model.num_layers=2,x")]
    config = str(ROOT / "configs" / "smoke.py")
    with pytest.raises(ValueError, match=r"(?s)did you mean .*learning_rate\?.*must be int, got"):
        space.check_config(config, axes, [])
    models = [space.parse(t) for t in ("model.name=decoder,lstm", "model.num_kv_heads=1,2")]
    space.check_config(config, models, ["--config.seed=1"])
    with pytest.raises(ValueError, match=r"config\.sede is not a config key"):
        space.check_config(config, models, ["--config.sede=1"])


def test_names_are_short_and_tell_keys_apart():
    point = {"optimizer.learning_rate": 1e-3, "optimizer.name": "muon", "model.name": "decoder"}
    assert space.name(point) == "learning_rate=0.001,optimizer.name=muon,model.name=decoder"
    flags = space.arguments("c.py", {"seed": 1, "fold": 2}, ["--config.data.train=d/{fold}"])
    assert flags == ["--config=c.py", "--config.data.train=d/2", "--config.seed=1"]


def test_every_point_has_a_folder_of_its_own_that_file_systems_take(tmp_path):
    values = ["a/b", "a_b", "a:b", "a b", "../a", "x" * 400, "x" * 400 + "y", "é" * 150, "('a',)"]
    points = [{"data.train": value, "optimizer.name": "muon"} for value in values]
    names = [space.name(point) for point in points]
    assert len(set(names)) == len(values) and names == [space.name(point) for point in points]
    assert names[1] == "train=a_b,name=muon"  # as ever where nothing is replaced or cut
    for name in names:
        (tmp_path / f"000-{name}").mkdir()
        assert "/" not in name and len(name.encode()) <= space.LONGEST
    assert names[0].startswith("train=a_b,name=muon-")


# ---- running, with a stand-in for the training script ----


@pytest.fixture
def fake(tmp_path, make_config):
    """The command of a training script that takes no time."""
    template = tmp_path / "template.json"
    template.write_text(conversion.to_json(make_config()))
    return [sys.executable, str(ROOT / "tests" / "fake_train.py"), str(template)]


def make_runs(rates, *settings, seeds=1):
    points = space.with_seeds_and_folds(space.grid([space.Choice(RATE, tuple(rates))]), seeds, 1)
    return [Trial(space.name(p), p, space.arguments("x.py", p, settings)) for p in points]


def starts(root, run):
    return (root / run.name / "starts").read_text().splitlines()


def test_failed_and_diverged_runs_are_recorded_and_the_others_done(tmp_path, fake):
    runs, said = make_runs([0.1, 1, -1, 0.01]), []
    root = tmp_path / "sweep"
    ended = []
    go = {"slots": 2, "command": fake, "say": said.append}
    assert pool.run_all(root, iter(runs), ended=lambda r, o: ended.append((r, o)), **go) is None
    outcomes = {run.point[RATE]: pool.read_outcome(root, run.name) for run in runs}
    assert {rate: o.status for rate, o in outcomes.items()} == {
        0.1: "finished", 0.01: "finished", 1: "diverged", -1: "failed"
    }  # fmt: skip
    assert outcomes[1].message == "step 3: the loss is not finite" and outcomes[1].code == 41
    assert outcomes[-1].message == "the rate is negative" and outcomes[-1].code == 1
    assert sorted(r.name for r, _ in ended) == sorted(r.name for r in runs)
    # once more: nothing is started, everything is told again
    again = []
    pool.run_all(root, iter(runs), ended=lambda r, o: again.append(o), **go)
    assert again == [outcomes[run.point[RATE]] for run in runs]
    assert all(len(starts(root, run)) == 1 for run in runs)

    table = report.collect(root, runs)
    assert [row["loss"] for row in table] == [3.0, None, None, 2.0]
    assert table[0]["tokens"] == 6 * 512 and table[0][RATE] == 0.1
    assert "4 runs: 2 finished, 1 diverged, 1 failed" in report.summary(table)
    assert "the loss is not finite" in report.summary(table)
    ranks = report.rank(runs, table)
    assert [r.point[RATE] for r in ranks[:2]] == [0.01, 0.1]
    report.plot(ranks, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 5000


def test_a_run_that_an_earlier_sweep_left_alive_is_waited_for(tmp_path, fake):
    [run] = make_runs([0.1], "--config.sleep=1.5")
    orphan = pool._start(tmp_path, run, fake)
    # and that sweep is killed: nobody waits for the process
    said = []
    pool.run_all(tmp_path, iter([run]), slots=1, command=fake, say=said.append)
    assert "waiting for it" in said[0]
    assert orphan.wait() == 0
    assert len(starts(tmp_path, run)) == 2  # the second start finds the run finished
    assert pool.read_outcome(tmp_path, run.name).status == "finished"


def test_a_run_that_was_started_by_hand_is_waited_for(tmp_path, fake):
    [run] = make_runs([0.1])
    hand, said = contextlib.ExitStack(), []
    hand.enter_context(workdir_lock.lock_workdir(str(tmp_path / run.name)))
    threading.Timer(0.8, hand.close).start()
    pool.run_all(tmp_path, iter([run]), slots=1, command=fake, say=said.append)
    assert len(said) == 1 and "waiting for it" in said[0]
    assert len(starts(tmp_path, run)) == 1
    assert pool.read_outcome(tmp_path, run.name).status == "finished"


def test_a_killed_run_is_started_again_but_not_for_ever(tmp_path, monkeypatch):
    [run] = make_runs([0.1])
    killer = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    said = []
    pool.run_all(tmp_path, iter([run]), slots=1, command=killer, say=said.append)
    assert said == [f"{run.name}: exit code 137; started again"] * pool.RETRIES
    assert pool.read_outcome(tmp_path, run.name).status == "failed"


DEAF = """
import pathlib, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
pathlib.Path(sys.argv[-1].removeprefix("--workdir="), "up").touch()
time.sleep(120)
"""


def test_a_run_that_ignores_sigterm_is_killed(tmp_path):
    deaf, [run] = [sys.executable, "-c", DEAF], make_runs([0.1])
    is_up = (tmp_path / "pruned" / run.name / "up").exists
    began = time.monotonic()
    go = {"slots": 1, "command": deaf, "grace": 1.0}
    pool.run_all(tmp_path / "pruned", iter([run]), should_prune=lambda run: is_up(), **go)
    assert pool.read_outcome(tmp_path / "pruned", run.name) == pool.Outcome("pruned", 137)

    def stop_the_sweep():
        while not (tmp_path / "stopped" / run.name / "up").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_the_sweep, daemon=True).start()
    assert pool.run_all(tmp_path / "stopped", iter([run]), **go) == signal.SIGTERM
    assert pool.read_outcome(tmp_path / "stopped", run.name) is None  # it may go on
    assert time.monotonic() - began < 60


# ---- the search ----


AXES = (space.parse(f"{RATE}=1e-6..0.9:log"),)


def test_a_search_finds_where_the_loss_is_low(tmp_path):
    search, losses = Search(tmp_path, AXES, 20, 0, "x.py", ()), []
    for run in search.runs():
        losses.append((np.log10(run.point[RATE]) + 2) ** 2)
        search.tell(len(losses) - 1, "finished", losses[-1])
    assert min(losses) < 0.05 and np.median(losses[10:]) < np.median(losses[:10]) / 2


def test_a_killed_search_goes_on_and_prunes(tmp_path, fake):
    proposed = next(Search(tmp_path, AXES, 5, 0, "x.py", ()).runs())  # and killed
    search, ended = Search(tmp_path, AXES, 5, 0, "x.py", ()), []

    def tell(run, outcome):
        ended.append(run)
        search.ended(run, outcome)

    pool.run_all(tmp_path, search.runs(), slots=1, command=fake, ended=tell)
    assert ended[0] == proposed and len({run.name for run in ended}) == len(ended) == 5
    # the run of a sixth trial is above the median at its first evaluation, and goes on for minutes
    more = Search(tmp_path, AXES, 6, 0, "x.py", ("--config.pause=30",))
    name = [run.name for run in more.runs()][5]
    point = {RATE: 1e-6}
    worst = Trial(name, point, space.arguments("x.py", point, ["--config.pause=30"]))
    go = {"should_prune": more.should_prune, "ended": more.ended}
    pool.run_all(tmp_path, iter([worst]), slots=1, command=fake, **go)
    assert pool.read_outcome(tmp_path, name).status == "pruned"


def test_pruning_and_ranking_read_the_same_mean_over_stores(tmp_path, make_config):
    folder = tmp_path / "000-x"
    folder.mkdir()
    (folder / "config.json").write_text(conversion.to_json(make_config()))
    (folder / "ledger.jsonl").write_text(
        "".join(jsonl.line({"step": i, "filled": 500, "padding": 12}) for i in range(6))
    )
    (folder / "metrics.jsonl").write_text(
        "".join(
            jsonl.line({"step": 6, "kind": "eval", "source": name, "tokens": n, "loss": loss})
            for name, n, loss in (("a", 900, 2.0), ("b", 100, 4.0))
        )
    )
    search = Search(tmp_path, AXES, 1, 0, "x.py", ())
    [run] = search.runs()
    (tmp_path / run.name).symlink_to(folder)
    search.should_prune(run)
    reported = search._study.trials[0].intermediate_values
    assert reported == {6: pytest.approx(2.2)}  # not 3, the plain mean
    assert run_table.read(str(folder)).loss == reported[6]


# ---- the report ----


def test_a_ranking_says_what_seeds_do_not_tell_apart():
    runs = make_runs([0.1, 0.2, 0.3, 0.4], seeds=3)
    losses = [2.0, 2.1, 1.9, 2.05, 2.15, 1.95, 3.0, 3.1, 2.9, 1.0, 1.1, None]
    table = [{"loss": x, "status": "diverged" if x is None else "finished"} for x in losses]
    ranks = report.rank(runs, table)
    # a point that diverged with one seed is no winner
    assert [r.point[RATE] for r in ranks] == [0.1, 0.2, 0.3, 0.4]
    assert ranks[0].mean == pytest.approx(2) and ranks[0].spread == pytest.approx(0.1)
    text = report.ranking(ranks).splitlines()
    assert not text[1].endswith("~") and text[2].endswith("~") and not text[3].endswith("~")
    assert "2, 1 diverged" in text[4]


# ---- clusters ----


WILD = 'a b\'s "c" %j 100% {} {fold} [*]? ~ # & ; | < > ! `x` $HOME $(HOME) $$ ${NAME} é'


def run_task(path, script, code=0, **environment):
    """The words that task 1 of a written array, or the last run of a slot, gave to `script`, which
    ends with `code`.
    """
    said = path.parent / "said"
    said.unlink(missing_ok=True)
    stub = path.parent / "stub"
    stub.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >>{shlex.quote(str(said))}\nexit {code}\n')
    stub.chmod(0o755)
    text = path.read_text().replace(script, shlex.quote(str(stub)))
    done = subprocess.run(
        ["bash", "-c", text, str(path)], env={**os.environ, **environment}, check=False
    )
    return done.returncode, said.read_text().split("\0")[:-1] if said.exists() else []


def test_a_slurm_array_gives_every_task_the_flags_of_its_run(tmp_path):
    root = tmp_path / WILD
    runs = make_runs([0.1, 0.2], "--config.data.train=('a b','c')")
    path = cluster.write_slurm(root, runs, slots=2, home=str(root))
    script = path.read_text()
    assert "#SBATCH --array=0-1%2" in script and "#SBATCH --requeue" in script
    _, said = run_task(path, cluster.SLURM, SLURM_ARRAY_TASK_ID="1")
    assert said == [*runs[1].arguments, f"--workdir={root / runs[1].name}"]
    # what SLURM reads of the log's name: words as in a shell, and %% for a percent sign
    (log,) = [line for line in script.splitlines() if line.startswith("#SBATCH --output=")]
    (word,) = shlex.split(log.removeprefix("#SBATCH "))
    assert word == f"--output={root}/".replace("%", "%%") + "%x-%A_%a.log"


WRITERS = [cluster.write_slurm, cluster.write_tpu_vm, cluster.write_gke]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("home", ["gs://bucket/a sweep", "s3://bucket/sweep"])
def test_runs_in_a_bucket_stay_there(tmp_path, write, home):
    runs = make_runs([0.1])
    path = write(tmp_path, runs, 1, home)
    commands = tmp_path / "commands.txt"
    text = (commands if commands.exists() else path).read_text()
    assert f"--workdir={home}/{runs[0].name}" in shlex.split(text, comments=True)


@pytest.mark.parametrize("write", WRITERS)
def test_a_flag_that_no_line_can_hold_is_refused(tmp_path, write):
    with pytest.raises(ValueError, match="has a line break"):
        write(tmp_path, make_runs([0.1], "--config.x='a\nb'"), 1, "gs://b/x")


def test_a_backslash_in_the_name_of_slurms_log_is_refused(tmp_path):
    with pytest.raises(ValueError, match="backslash"):
        cluster.write_slurm(tmp_path / "a\\b", make_runs([0.1]), 1, "x")


def test_commands_for_tpus_train_every_run_once_on_its_resource(tmp_path):
    runs, home = make_runs([0.1, 0.2, 0.3]), f"gs://b/{WILD}"
    path = cluster.write_tpu_vm(tmp_path, runs, slots=2, home=home)
    environment = {"NAME": "s", "ZONE": "z", "TYPE": "v6e-8"}
    _, said = run_task(path, cluster.TPU_VM, code=46, **environment)
    assert {word for word in said if word.startswith("--workdir")} == {
        f"--workdir={home}/{run.name}" for run in runs
    }
    assert said.count("train") == 3
    lines = path.read_text().splitlines()
    slots = [i for i, line in enumerate(lines) if line.startswith("( export NAME=$name-")]
    assert [lines[i + 1].count("0.1/") or "0.1" in lines[i + 1] for i in slots] == [True, False]
    # what was left is done by the same commands, what is finished is not
    (tmp_path / "codes" / runs[0].name).write_text("0\n")
    _, said = run_task(path, cluster.TPU_VM, **environment)
    assert said.count("train") == 2
    assert run_task(path, cluster.TPU_VM, **environment)[1] == []


KUBECTL = r"""
# JobSets are lines of `applied`; one whose rate is 1 diverges
case "$*" in
  *apply*) manifest=$(cat) && folder=${manifest##*workdir=}
    echo "$NAME ${folder%%\"*}" >>"$CLOUD/applied"
    [[ $manifest == *learning_rate=1\"* ]] && echo Failed >"$CLOUD/state-$NAME" ||
      echo Completed >"$CLOUD/state-$NAME" ;;
  *"get jobset"*) cat "$CLOUD/state-$NAME" ;;
  *"get pods"*) echo 0 41 ;;
  *"delete jobset"*) rm "$CLOUD/state-$NAME" ;;
esac
"""


def test_commands_for_gke_train_every_run_once_in_a_jobset(tmp_path):
    runs = make_runs([0.1, 1, 0.3])
    path = cluster.write_gke(tmp_path / "sweep", runs, slots=2, home="gs://b/s")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "kubectl").write_text(f"#!/bin/bash\n{KUBECTL}")
    (folder / "kubectl").chmod(0o755)
    environment = {
        **os.environ,
        **{"PATH": f"{folder}:{os.environ['PATH']}", "CLOUD": str(tmp_path), "NAME": "s"},
        **{"IMAGE": "example.com/lm:1", "ACCELERATOR": "nvidia-h100-80gb", "POLL": "0.01"},
    }
    for expected in (3, 4):  # what has finished is not trained again
        done = subprocess.run([path], env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        applied = (tmp_path / "applied").read_text().splitlines()
        assert len(applied) == expected
    assert {line.split()[0] for line in applied} == {"s-0", "s-1"}
    assert all(any(f"gs://b/s/{run.name}" in line for line in applied) for run in runs)
    codes = [(tmp_path / "sweep" / "codes" / run.name).read_text() for run in runs]
    assert codes == ["0\n", "41\n", "0\n"]
    assert not list(tmp_path.glob("state-*"))  # every JobSet was deleted


@pytest.mark.parametrize("write", [cluster.write_tpu_vm, cluster.write_gke])
def test_runs_that_would_be_lost_with_their_machines_are_refused(tmp_path, write):
    with pytest.raises(ValueError, match=r"would be lost.*--runs=gs://BUCKET"):
        write(tmp_path, make_runs([0.1]), slots=1, home=str(tmp_path))


def test_collecting_takes_what_a_cluster_has_recorded_and_starts_nothing(tmp_path, fake):
    root, home = tmp_path / "sweep", str(tmp_path / "bucket")
    runs = make_runs([0.1, 0.2, 0.3, 0.4, 0.5])
    path = cluster.write_slurm(root, runs, slots=2, home=home)
    for index, code in enumerate((0, 41, 1, 143)):
        if code == 0:  # the cluster trains it
            (tmp_path / "bucket" / runs[index].name).mkdir(parents=True)
            flags = [*runs[index].arguments, f"--workdir={home}/{runs[index].name}"]
            subprocess.run([*fake, *flags], check=True)
        environment = {"SLURM_ARRAY_TASK_ID": str(index)}
        assert run_task(path, cluster.SLURM, code=code, **environment)[0] == code
    table = report.collect(root, runs, home)
    statuses = ["finished", "diverged", "failed", "unfinished", "unfinished"]
    assert [row["status"] for row in table] == statuses
    assert table[0]["loss"] == 3.0 and table[2]["message"] == "exit code 1, on a cluster"
    assert not list(root.glob("*/outcome.json"))
    # a later start of the job may mend what failed
    run_task(path, cluster.SLURM, code=42, SLURM_ARRAY_TASK_ID="2")
    assert report.collect(root, runs, home)[2]["status"] == "unfinished"
    # a run that failed here, where the cluster's mesh isn't, is finished all the same
    (root / runs[0].name).mkdir()
    pool.record(root, runs[0].name, pool.Outcome("failed", 1, "not enough devices"))
    assert report.collect(root, runs, home)[0]["status"] == "finished"


def test_a_run_that_is_finished_is_not_started(tmp_path, fake, make_config):
    """Without a record of its end: by its last evaluation and its last checkpoint."""
    [run] = make_runs([0.1])
    folder = tmp_path / run.name
    (folder / "checkpoints" / "10").mkdir(parents=True)
    (folder / "config.json").write_text(conversion.to_json(make_config()))
    (folder / "metrics.jsonl").write_text(
        jsonl.line({"step": 10, "kind": "eval", "source": "a", "tokens": 9, "loss": 2.0})
    )
    ended = []
    pool.run_all(tmp_path, iter([run]), slots=1, command=fake, ended=lambda r, o: ended.append(o))
    assert [outcome.status for outcome in ended] == ["finished"]
    assert not (folder / "starts").exists()


# ---- the real thing ----


def sweep(root, *flags, rates="1e-3,3e-3,1e30", steps=600):
    return [
        sys.executable, str(ROOT / "scripts" / "sweep.py"), f"--config={ROOT}/configs/smoke.py",
        f"--workdir={root}", f"--grid={RATE}={rates}", f"--config.train.num_steps={steps}",
        "--config.checkpoint.every=20", "--config.guard.self_check=False", *flags,
    ]  # fmt: skip


def test_a_sweep_without_an_axis_is_refused(tmp_path):
    root = tmp_path / "sweep"
    done = run_script("sweep", "--config=configs/smoke.py", f"--workdir={root}")
    assert done.returncode == Exit.ERROR and done.stderr.count("\n") == 1
    assert "a sweep needs an axis: --grid=" in done.stderr and not root.exists()


def test_a_small_sweep_trains_its_runs_and_ranks_them(tmp_path):
    root = tmp_path / "a sweep's {fold} 100%j ~ [*]"
    go = {"env": fake_devices(1), "cwd": ROOT, "text": True, "capture_output": True}
    command = sweep(root, rates="3e-3,1e30", steps=4)
    done = subprocess.run([*command, "--slots=2"], **go, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 runs: 1 finished, 1 diverged" in done.stdout
    assert " 1 learning_rate=0.003 " in done.stdout  # the ranking's first
    with (root / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished", "diverged"]
    assert 2 < float(rows[0]["loss"]) < 6 and rows[1]["loss"] == ""
    assert (root / "sweep.png").stat().st_size > 5000
    pages = [root / "report.html", *root.glob("*/report.html")]
    assert len(pages) == 3 and all(page.stat().st_size > 1e6 for page in pages)
    (root / "sweep.csv").unlink()
    collected = subprocess.run([*command, "--collect"], **go, check=False)
    assert collected.returncode == 0, collected.stderr
    assert collected.stdout.splitlines() == done.stdout.splitlines()[2:]  # without the runs' ends
    assert (root / "sweep.csv").exists()


@pytest.mark.slow
def test_a_sweep_that_is_killed_and_started_again_does_every_run_once(tmp_path):
    environment = fake_devices(1)
    options = {"env": environment, "cwd": ROOT, "text": True}
    first = subprocess.Popen(sweep(tmp_path), stdout=subprocess.DEVNULL, **options)
    second_run = tmp_path / "learning_rate=0.003"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        records = metrics.read(str(second_run)) if second_run.exists() else []
        if records and records[-1]["step"] >= 45:  # the checkpoint at 20 is surely there
            break
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()  # and what it started, as when the machine goes down
    for line in subprocess.run(
        ["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if f"--workdir={second_run}" in line:
            os.kill(int(line.split()[0]), signal.SIGKILL)
    first.wait()
    assert not (second_run / "outcome.json").exists()

    done = subprocess.run(sweep(tmp_path), capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert "3 runs: 2 finished, 1 diverged" in done.stdout
    assert "learning_rate=1e+30: step" in done.stdout
    logs = [(tmp_path / name / "log.txt").read_text() for name in
            ("learning_rate=0.001", "learning_rate=0.003", "learning_rate=1e+30")]  # fmt: skip
    assert [log.count("from step 0 ") for log in logs] == [1, 1, 1]
    assert [log.count("ready in") for log in logs] == [1, 2, 1]  # the second went on
    assert [e["step"] for e in data_ledger.read(str(second_run))] == list(range(600))
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished", "finished", "diverged"]
    assert float(rows[1]["loss"]) < float(rows[0]["loss"]) and rows[2]["loss"] == ""
    lines = (tmp_path / "sweep.jsonl").read_text().splitlines()
    assert [json.loads(line)["run"] for line in lines] == [row["run"] for row in rows]
    refused = subprocess.run(
        sweep(tmp_path, "--config.seed=1"), capture_output=True, check=False, **options
    )
    assert refused.returncode == 1 and "holds another sweep" in refused.stderr
