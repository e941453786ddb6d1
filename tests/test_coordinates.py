"""Changes by the first steps have one size at every width under mup, and not otherwise."""

import dataclasses
import json
import math

import numpy as np
import pytest

from lm.scaling import coord_check
from lm.scaling.powers import fit_power

WIDTHS = (32, 128)


@pytest.fixture(scope="module")
def base(make_config):
    """A base of width 32, small enough to compile in seconds."""
    return make_config(
        {
            "model.embed_dim": 32,
            "model.num_heads": 2,
            "model.num_kv_heads": 2,
            "model.mlp_dim": 64,
            "model.init_std": 0.05,
            "model.scan_unroll": 1,
            "data.length": 8,
            "data.batch_size": 2,
            "loss.chunk_size": 0,
            "optimizer.learning_rate": 3e-3,
            "optimizer.weight_decay": 0.1,
            "optimizer.clip_norm": 0.0,
        }
    )


@pytest.fixture(scope="module")
def checks(base, devices):
    """{parametrization: the check of it}; at the base they are the same program."""

    def check(name, sizes):
        options = {"sizes": sizes, "num_steps": 3}
        return coord_check.check(base, devices[:1], parametrization=name, **options)

    mup, wide = check("mup", WIDTHS), check("standard", WIDTHS[1:])
    values = {
        name: {kind: [mup.values[name][kind][0], *found] for kind, found in kinds.items()}
        for name, kinds in wide.values.items()
    }
    return {"mup": mup, "standard": dataclasses.replace(wide, sizes=WIDTHS, values=values)}


def test_changes_keep_their_size_under_mup_alone(checks):
    names = {"block 1", "block 2", "scores 1", "scores 2", "target"}
    mup, standard = (checks[name].slopes("change") for name in ("mup", "standard"))
    assert mup.keys() == standard.keys() == {*names, "logits"}
    for name in names:
        assert abs(mup[name]) < 0.25, mup
        assert standard[name] > 0.5, standard
    # 264 tokens are more than the widths: see `activations`
    assert -0.5 < mup["logits"] < 0.2 and standard["logits"] > 0.5


def test_a_check_is_written_and_drawn(checks, tmp_path):
    found = json.loads(json.dumps(checks["mup"].to_json()))
    assert found["sizes"] == list(WIDTHS) and len(found["slopes"]["change"]) == 3
    assert found["slopes"]["change"][-1] == checks["mup"].slopes("change")
    coord_check.draw(list(checks.values()), str(tmp_path / "check.png"))
    assert (tmp_path / "check.png").stat().st_size > 10_000
    assert "mup, change" in coord_check.table(list(checks.values()))


def test_slopes_are_exponents():
    def slope(sizes, values):
        return fit_power(np.array(sizes), np.array(values)).exponent

    assert slope([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert slope([32, 64, 128], [5, 5, 5]) == pytest.approx(0)
    assert math.isnan(slope([1, 2], [0, 1]))


def test_sizes_grow_in_proportion(base):
    found = coord_check.resized(base, "width", 96)
    wanted = {"embed_dim": 96, "mlp_dim": 192, "num_heads": 6, "num_kv_heads": 6, "head_dim": 16}
    wanted |= {"base_embed_dim": 32, "base_num_layers": 2, "base_head_dim": 16}
    assert wanted.items() <= {k.removeprefix("model."): v for k, v in found.items()}.items()
    found = coord_check.resized(base, "head_dim", 64)
    assert found["model.head_dim"] == 32 and "model.num_heads" not in found
    assert coord_check.resized(base, "depth", 6)["model.num_layers"] == 6
    with pytest.raises(ValueError, match=r"config\.model\.num_heads \(2\) times 40 / 32"):
        coord_check.resized(base, "width", 40)
