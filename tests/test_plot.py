"""Pictures of runs say what their records do."""

import json

import pytest

from lm import metrics, plot


def write(workdir, losses):
    lines = [
        json.dumps({"step": i + 1, "kind": "train", "loss": loss, "learning_rate": 10.0 ** (i - 9)})
        for i, loss in enumerate(losses)
    ]
    (workdir / metrics.METRICS_FILE).write_text("\n".join(lines) + "\n")


def test_the_range_curve_finds_the_lowest_loss(tmp_path):
    write(tmp_path, [5.0, 4.5, 4.0, 3.0, 2.0, 6.0, 9.0])
    path, rate = plot.range_curve(str(tmp_path), smoothing=0.2)
    assert rate == 1e-5 and path.endswith("lr_range.png")
    _, smoothed = plot.range_curve(str(tmp_path), smoothing=0.9)  # remembers the first ones
    assert smoothed == 1e-5


def test_a_run_without_records_is_refused(tmp_path):
    write(tmp_path, [5.0])
    with pytest.raises(ValueError, match="1 records of training"):
        plot.range_curve(str(tmp_path))
