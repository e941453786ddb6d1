"""Plans from a fit, and the two scripts from a table to a plan, with what they refuse."""

import dataclasses
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lm.scaling import artefact, figures, intervals, planner, report
from lm.scaling.analysis import analyse
from lm.scaling.artefact import Options
from lm.scaling.planner import Machine
from scripts import fit_scaling_law, plan_compute
from tests.scaling_tables import CHINCHILLA, grid, source


def with_settings(made):
    """The table with 3 learning rates for every run, best near the middle, and one batch size."""
    rates = np.tile([1e-3, 2e-3, 4e-3], len(made))
    tripled = made.take(np.repeat(np.arange(len(made)), 3))
    best = 2e-3 * (tripled.parameters / 1e9) ** -0.05
    loss = tripled.loss * (1 + 0.05 * np.log(rates / best) ** 2)
    return dataclasses.replace(
        tripled,
        loss=loss,
        rows=np.arange(1, len(loss) + 1),
        learning_rate=rates,
        batch_size=np.full(len(loss), 256.0),
    )


@pytest.fixture(scope="module")
def runs():
    return with_settings(grid(noise=0.004))


@pytest.fixture(scope="module")
def result(runs):
    return analyse(runs, source(len(runs)), Options(num_replicates=40))


@pytest.fixture(scope="module")
def repeated():
    law = dataclasses.replace(CHINCHILLA, repeats=15.4)
    made = grid(law, noise=0.001, unique=4e9)
    return analyse(made, source(), Options(num_replicates=20, fits_repeats=True))


def test_a_plan_is_the_optimum_of_the_law(result):
    plan = planner.plan(result, 1e23)
    size, tokens = result.law.optimum(1e23)
    assert (plan.parameters.value, plan.tokens.value) == pytest.approx((size, tokens))
    assert plan.loss.value == pytest.approx(float(result.law.loss(size, tokens)[0]))
    assert plan.distance == pytest.approx(1e23 / 1.8e22)
    for found, truth in zip((plan.parameters, plan.tokens), CHINCHILLA.optimum(1e23), strict=True):
        assert found.low < truth < found.high
    assert plan.loss.low < float(CHINCHILLA.loss(*CHINCHILLA.optimum(1e23))[0]) < plan.loss.high


def test_the_interval_of_a_loss_has_the_noise_of_one_run(result):
    loss = planner.plan(result, 1e22).loss
    alone = 1.645 * result.noise * loss.value
    assert (loss.high - loss.low) / 2 > 0.8 * alone


def test_settings_come_from_their_laws_and_say_where_there_was_no_sweep(result):
    plan = planner.plan(result, 1e22)
    assert plan.settings["learning_rate"].value == pytest.approx(2e-3, rel=0.2)
    assert plan.settings["batch_size"].value == pytest.approx(256)
    [as_run] = [w for w in plan.warnings if "no sweep" in w]
    assert as_run.startswith("batch_size")


def test_a_budget_too_far_out_is_refused_and_a_larger_factor_allows_it(result):
    with pytest.raises(ValueError, match=r"556 times .*\(1\.8e\+22\).*=1000 plans it"):
        planner.plan(result, 1e25)
    plan = planner.plan(result, 1e25, max_extrapolation=1000)
    assert any(w.startswith("556 times the FLOPs") for w in plan.warnings)
    assert not any("times the FLOPs" in w for w in planner.plan(result, 1e23).warnings)
    for budget in (0.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="finite and above 0"):
            planner.plan(result, budget)


def test_a_plan_warns_of_an_approach_that_rests_on_little_whatever_its_artefact_says(result):
    assert not any(w.startswith("isoflop") for w in planner.plan(result, 1e22).warnings)
    wide = dataclasses.replace(
        result.isoflop.parameters, exponent=intervals.Estimate(0.678, 0.469, 1.002)
    )
    isoflop = dataclasses.replace(result.isoflop, parameters=wide)
    old = dataclasses.replace(result, isoflop=isoflop)
    [warning] = [w for w in planner.plan(old, 1e22).warnings if w.startswith("isoflop")]
    assert "N_opt ~ C^0.678 may be 0.469 to 1.002" in warning
    said = dataclasses.replace(old, warnings=[warning])
    assert planner.plan(said, 1e22).warnings.count(warning) == 1


def test_another_count_of_flops_than_the_tables_is_said(result):
    assert not any("x parameters x tokens" in w for w in planner.plan(result, 1e22).warnings)
    plan = planner.plan(result, 1e22, factor=9.0)
    assert plan.parameters.value == pytest.approx(result.law.optimum(1e22, 9.0)[0])
    assert any("9 x parameters x tokens; in the table they are 6.00" in w for w in plan.warnings)


def test_with_few_tokens_the_best_size_grows_and_is_the_best_there_is(repeated):
    free, short = (planner.plan(repeated, 1e23, unique_tokens=u) for u in (1e13, 2e10))
    assert free.epochs == 1 and free.parameters.value == repeated.law.optimum(1e23)[0]
    assert short.parameters.value > 1.2 * free.parameters.value
    assert short.epochs == pytest.approx(short.tokens.value / 2e10)
    assert short.epochs > 5
    sizes = short.parameters.value * np.geomspace(0.2, 5, 400)
    losses = repeated.law.loss(sizes, 1e23 / 6 / sizes, 2e10)
    assert float(repeated.law.loss(short.parameters.value, short.tokens.value, 2e10)[0]) == (
        pytest.approx(losses.min(), rel=1e-6)
    )


def test_a_fit_that_knows_nothing_of_repeats_plans_none(result):
    with pytest.raises(ValueError, match=r"of 1e\+09 distinct ones, .*--repeats"):
        planner.plan(result, 1e22, unique_tokens=1e9)


def test_days_and_flops_of_a_machine_are_inverse_and_the_lower_mfu_is_sure():
    machine = Machine(num_chips=64, peak_flops=64 * 459e12, mfu=(0.3, 0.6))
    flops = machine.flops(3.0)
    assert flops == pytest.approx(64 * 459e12 * 0.3 * 3 * 86400)
    assert machine.days(flops) == pytest.approx((1.5, 3.0))


def test_the_page_of_a_plan_tells_cost_and_distance(result):
    machine = Machine(num_chips=64, peak_flops=64 * 459e12, mfu=(0.3, 0.6))
    plan = planner.plan(result, machine.flops(3.0))
    page = report.plan_page(plan, result, machine=machine, price=2.0)
    assert "1.5 to 3 at MFU 30% to 60%" in page
    assert "4,608 to 9,216 at 2 a chip-hour" in page  # 64 chips, 24 hours, 1.5 and 3 days
    assert f"{plan.distance:.3g} times its largest run" in page


def test_figures_show_every_run_and_every_size(runs, result):
    best = runs.best()
    made = figures.every_figure(best, result)
    assert made.keys() == {"loss", "isoflop", "law", "optimum", "held_out", "settings"}
    axis, scale = made["loss"].axes
    dots = axis.collections[0]
    assert len(dots.get_offsets()) == len(best) == 36 and len(set(dots.get_array())) == 6
    assert len(scale.get_yticklabels()) == 6
    axis, _ = made["isoflop"].axes
    [stars] = [line for line in axis.lines if line.get_marker() == "*"]
    assert list(stars.get_xdata()) == result.isoflop.points["parameters"]
    for figure in made.values():
        FigureCanvasAgg(figure).draw()
        for axis in figure.axes:  # no legend lies on what is drawn
            if (legend := axis.get_legend()) is not None:
                assert not legend.get_window_extent().overlaps(axis.get_window_extent())
    # the interval of the law's size is drawn as wide as it is
    band = made["optimum"].axes[0].collections[-1].get_paths()[0].vertices
    low = intervals.estimate(
        result.law.optimum(1.8e24)[0], np.asarray(result.laws.optimum(1.8e24)[0]), 0.9
    )
    assert band[:, 1].max() == pytest.approx(low.high, rel=1e-6)


def test_an_approach_without_a_law_is_not_drawn(tmp_path, script):
    table = Path(__file__).parents[1] / "docs" / "ladder.csv"  # no best size lies between others
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("isoflop", "own"):
        (pictures / f"{name}.png").write_bytes(b"of an earlier fit")
    out = tmp_path / "fit.json"
    flags = {"table": table, "counting": "total", "out": out, "replicates": 20}
    page = script(fit_scaling_law, **flags, pictures=pictures)
    assert "2 isoflop   no: " in page and "isoflop.png" not in page and "own.png" not in page
    names = {path.stem for path in pictures.iterdir()}
    assert names == {"loss", "law", "optimum", "held_out", "own"}
    plan = script(plan_compute, fit=out, flops=1e15)
    assert "by isoflop " in plan and "no law\n" in plan


# ---- the scripts ----


@pytest.fixture
def script(monkeypatch, capsys):
    """(module, flags) -> what it prints."""

    def call(module, **flags):
        words = [f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]
        monkeypatch.setattr("sys.argv", [module.__name__, *words])
        assert module.main() == 0
        return capsys.readouterr().out

    return call


def write(path, made):
    columns = ("parameters", "tokens", "flops", "loss", "learning_rate", "batch_size")
    rows = zip(*(getattr(made, c).tolist() for c in columns), strict=True)
    lines = [",".join(columns), *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_from_a_table_to_a_plan_by_two_commands(script, runs, tmp_path):
    table = write(tmp_path / "runs.csv", runs)
    fit, plan = tmp_path / "fit.json", tmp_path / "plan.json"
    page = script(
        fit_scaling_law,
        table=table,
        counting="total",
        out=fit,
        pictures=tmp_path / "pictures",
        replicates=20,
    )
    result = artefact.from_json(fit.read_text())
    for name, found in result.constants.items():
        assert f"{name} " in page and f"{found.value:.4g} [" in page
    assert "72 at other than the best setting" in page
    assert result.data.sha256[:12] in page
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 6
    for path in (tmp_path / "pictures").glob("*.png"):
        assert matplotlib.image.imread(path).std() > 0.01

    compiled = tmp_path / "compiled.json"  # as scripts/plan.py --json writes it
    tree = {"topology": "v5p:4x4x4", "num_chips": 64, "num_devices": 64, "peak_flops": 459e12}
    compiled.write_text(json.dumps({**tree, "derived": {"mfu": [0.3, 0.6]}}))
    page = script(plan_compute, fit=fit, days=3, plan=compiled, json=plan, price_per_chip_hour=2)
    saved = json.loads(plan.read_text())
    assert saved["flops"] == pytest.approx(64 * 459e12 * 0.3 * 3 * 86400)
    assert "1.5 to 3 at MFU 30% to 60%" in page
    flags = {"topology": "v5p:4x4x4", "mfu": 0.3}
    assert f"{saved['flops']:.3g} FLOPs" in script(plan_compute, fit=fit, days=3, **flags)


REFUSED = {
    "no budget": ({}, "give one budget"),
    "two budgets": ({"flops": 1e22, "days": 3}, "give one budget"),
    "days without a machine": ({"days": 3}, "--days needs a machine"),
    "a topology without MFU": ({"days": 3, "topology": "v5p:4x4x4"}, "needs --mfu"),
    "an MFU of percent": ({"days": 3, "topology": "v5p:4x4x4", "mfu": 45}, "--mfu=45: .* 0 and 1"),
    "no peak": ({"days": 3, "topology": "cpu:8", "mfu": 0.4}, "no published peak"),
    "a price without a machine": ({"flops": 1e22, "price_per_chip_hour": 2}, "needs a machine"),
    "too far": ({"flops": 1e26}, "beyond --max-extrapolation=100"),
}


@pytest.mark.parametrize("flags, words", REFUSED.values(), ids=REFUSED)
def test_a_plan_that_cannot_be_made_says_why(script, result, tmp_path, flags, words):
    (tmp_path / "fit.json").write_text(artefact.to_json(result))
    with pytest.raises(ValueError, match=words):
        script(plan_compute, fit=tmp_path / "fit.json", **flags)
