"""A sweep of learning rates trains as runs do, goes on after a kill, and finds where curves are
lowest.
"""

import json
import math

import numpy as np
import pytest

from lm.scaling import lr_transfer
from lm.scaling.lr_transfer import TrainedPoint

RATES = [2.0**-9, 2.0**-6]


@pytest.fixture(scope="module")
def config(make_config):
    return make_config({"optimizer.schedule.kind": "constant", "train.num_steps": 4})


def test_a_rate_that_is_an_argument_is_the_rate_of_a_run(
    config, devices, make_experiment, tmp_path
):
    """The mean loss of the last step of four, against the training step of the config."""
    changes = {"optimizer.schedule.kind": "constant", "train.num_steps": 4}
    experiment = make_experiment({**changes, "optimizer.learning_rate": RATES[1]})
    state = experiment.init_state()
    for _, batch in experiment.batches(0, 4):
        state, sums, _ = experiment.train_step(state, batch)
    sweep = {"parametrizations": ["standard"], "widths": [16], "seeds": [0]}
    path = tmp_path / "runs.jsonl"
    runs = lr_transfer.sweep(config, devices[:1], path, rates=RATES, **sweep)
    assert [r.learning_rate for r in runs] == RATES and runs[0].loss != runs[1].loss
    assert runs[1].loss == pytest.approx(float(sums["loss"] / sums["tokens"]), rel=1e-5)

    lines = path.read_text().splitlines()
    path.write_text(lines[1] + "\n" + lines[0][:20])  # killed while it wrote
    again = lr_transfer.sweep(config, devices[:1], path, rates=RATES, **sweep)
    assert again[0] == runs[1] and again[1].loss == runs[0].loss
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2


def curve(name, width, center, seeds=(0, 1)):
    """Runs whose losses are a parabola in log2(rate), lowest at 2 ** center."""
    return [
        TrainedPoint(name, width, 2.0**x, seed, 2 + 0.1 * (x - center) ** 2 + 0.01 * seed, 1.0)
        for seed in seeds
        for x in range(-10, -4)
    ]


def test_best_rates_are_those_of_the_curves():
    runs = curve("mup", 64, -7.2) + curve("mup", 512, -6.9) + curve("standard", 512, -8.6)
    a, b, c = lr_transfer.best(runs)
    for found, center in ((a, -7.2), (b, -6.9), (c, -8.6)):
        assert math.log2(found.fitted) == pytest.approx(center)
        assert found.of_seeds == (found.rate,) * 2
    text = lr_transfer.table([a, b, c])
    assert "| mup | 512 | 2^-7 | 2^-7 2^-7 | 2^-6.90 | +0.30 | 2.006 |" in text


def test_a_best_rate_at_the_edge_or_beside_a_diverged_run_has_no_parabola():
    [edge] = lr_transfer.best(curve("standard", 64, -12))
    assert edge.rate == 2.0**-10 and math.isnan(edge.fitted)
    assert "| outside | ? |" in lr_transfer.table([edge])
    runs = curve("standard", 64, -7, seeds=(0,))
    runs = [r if r.learning_rate < 2.0**-6 else TrainedPoint(*r.key, None, 1.0) for r in runs]
    [beside] = lr_transfer.best(runs)
    assert beside.rate == 2.0**-7 and math.isnan(beside.fitted)


def test_curves_are_drawn(tmp_path):
    runs = curve("mup", 64, -7) + curve("standard", 64, -7) + curve("standard", 128, -8)
    lr_transfer.draw(runs, str(tmp_path / "transfer.png"))
    assert (tmp_path / "transfer.png").stat().st_size > 10_000
    diverged = lr_transfer.curves([TrainedPoint("mup", 64, 0.5, 0, None, 1.0)])
    assert diverged["mup", 64] == ([0.5], [[np.inf]])
