"""`lm watch`: frames of a run's folder, and the end of watching."""

import io
import json
import os
import pty
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console
from test_run_page import write_run

from lm.run_page import watch
from lm.run_page.folder import NoRun, RunFolder
from lm.telemetry import jsonl


def drawn(folder, *, width=100, height=30):
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(watch.frame(RunFolder(str(folder)), height))
    return console.file.getvalue()


def under_way(folder, *, wrote=None):
    """A run's files without its end: the last record is of now, or of `wrote`."""
    write_run(folder)
    lines = [json.loads(x) for x in (folder / "goodput.jsonl").read_text().splitlines()]
    lines[-1]["wrote"] = time.time() if wrote is None else wrote
    (folder / "goodput.jsonl").write_text("".join(map(jsonl.line, lines)))
    attempts = (folder / "attempts.jsonl").read_text().splitlines()
    (folder / "attempts.jsonl").write_text(attempts[0] + "\n")
    (folder / "overview.json").write_text(json.dumps({"num_steps": 80, "devices": "8 × TPU v5"}))


def test_a_frame_has_progress_loss_speed_goodput_evaluation_and_last_lines(tmp_path):
    under_way(tmp_path)
    text = drawn(tmp_path)
    assert "running" in text and "step 40 of 80" in text and "50.0% 20s left" in text
    assert "▁" in text and "0.6325" in text  # the last loss
    assert "240 tokens/s" in text and "8 × TPU v5" in text
    assert "gradient norm 0.5" in text and "learning rate 0.001" in text
    assert "1 start" in text and "eval 40" in text and "validation · loss 1.5" in text
    assert "step 39 · loss 0.6405" in text
    assert len(text.splitlines()) <= 30 and max(map(len, text.splitlines())) <= 100
    assert len(drawn(tmp_path, width=40, height=12).splitlines()) <= 20


def test_the_last_lines_are_those_of_the_log_where_there_is_one(tmp_path):
    under_way(tmp_path)
    (tmp_path / "log.txt").write_text("old\nstep 1\rstep 2\n" + "a warning\n")
    assert watch.last_lines(RunFolder(str(tmp_path)), 2) == ["step 2", "a warning"]


def test_bars_show_means_of_intervals_and_cut_the_first_losses():
    line = watch.sparkline([100.0, *[4.0, 2.0] * 49, 1.0], 25)
    assert len(line) == 25 and line[0] == "█" and len(set(line[1:-1])) == 1
    assert watch.sparkline([1.0, 2.0], 80) == "▁█"
    assert watch.sparkline([float("nan")], 10) == ""


def test_a_look_parses_new_lines_alone_and_notices_a_rollback(tmp_path, monkeypatch):
    parsed = []
    parse = jsonl.parse
    monkeypatch.setattr(jsonl, "parse", lambda x: parsed.append(x) or parse(x))
    path, follow = tmp_path / "metrics.jsonl", watch.LineFollower()
    assert follow(str(path)) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [r["step"] for r in follow(str(path))] == [1, 2]
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    assert [r["step"] for r in follow(str(path))] == [1, 2, 3]
    assert parsed[-1] == b'{"step": 3}\n'
    path.write_text('{"step": 1}\n{"step": 9}\n')
    assert [r["step"] for r in follow(str(path))] == [1, 9]


@pytest.mark.parametrize(
    "end, over", [({}, False), ({"code": 0}, True), ({"code": 41}, True), ({"code": 143}, False)]
)
def test_watching_ends_with_the_run_but_not_where_a_launcher_starts_it_again(tmp_path, end, over):
    line = {"attempt": 1, "began": "2026-01-01T00:00:00+00:00"}
    (tmp_path / "attempts.jsonl").write_text(jsonl.line(line | end))
    assert watch.has_ended(RunFolder(str(tmp_path))) == over


def test_a_run_in_a_bucket_is_watched_as_on_a_disk(folder, capsys):
    write_run(f"{folder}/run")
    watch.watch(f"{folder}/run", once=True)
    assert "step 40" in capsys.readouterr().out
    with pytest.raises(NoRun, match="is not there"):
        watch.watch(f"{folder}/nothing", once=True)


def test_a_terminal_is_redrawn_until_the_run_ends_and_a_pipe_gets_one_frame(tmp_path):
    under_way(tmp_path)
    code = f"from lm.run_page import watch; watch.watch({str(tmp_path)!r}, every=0.2)"
    environment = {**os.environ, "COLUMNS": "100", "LINES": "30", "TERM": "xterm"}
    command = [sys.executable, "-c", code]
    piped = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert piped.stdout.count("╭") == 1 and "step 40 of 80" in piped.stdout

    main, other = pty.openpty()
    process = subprocess.Popen(command, stdout=other, stderr=other, env=environment)
    os.close(other)
    output = bytearray()

    def read():
        while process.poll() is None or output:
            try:
                output.extend(os.read(main, 65536))
            except OSError:
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    deadline = time.monotonic() + 60
    while output.count("╭".encode()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    write_run(tmp_path)  # it ends
    assert process.wait(timeout=60) == 0
    reader.join(timeout=10)
    os.close(main)
    assert output.count("╭".encode()) >= 3 and b"finished" in output
