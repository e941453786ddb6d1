"""Scaling laws on tables whose law is known, and tables that tell nothing."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import huber

from lm.scaling import (
    artefact,
    frontier,
    intervals,
    parametric,
    powers,
    report,
    settings,
)
from lm.scaling.analysis import analyse
from lm.scaling.artefact import Options
from lm.scaling.table import Table, groups
from tests.scaling_tables import CHINCHILLA, SIZES, TOKENS, grid, source, unbalanced

FEW = Options(num_replicates=20)


def sets(law=CHINCHILLA, budgets=None, span=1.0, num=9):
    """A table of IsoFLOP sets: `num` sizes around the best of each budget, by e^span each way."""
    budgets = np.geomspace(1e18, 1e21, 4) if budgets is None else budgets
    n = np.concatenate([law.optimum(c)[0] * np.exp(np.linspace(-span, span, num)) for c in budgets])
    c = np.repeat(budgets, num)
    return Table(n, c / 6 / n, c, law.loss(n, c / 6 / n), np.arange(len(n)), "total")


def constants(law, names=parametric.NAMES[:5]):
    return np.array([float(np.asarray(getattr(law, n))) for n in names])


# ---- the law ----


def test_a_table_without_noise_gives_its_constants_back():
    fit = parametric.fit(grid())
    np.testing.assert_allclose(constants(fit.law), constants(CHINCHILLA), rtol=1e-9)
    assert fit.objective < 1e-20 and not fit.at_bound


def test_the_value_of_repeated_tokens_is_found():
    law = dataclasses.replace(CHINCHILLA, repeats=15.4)
    found = parametric.fit(grid(law, unique=4e9)).law
    np.testing.assert_allclose(constants(found), constants(CHINCHILLA), rtol=1e-6)
    assert found.repeats == pytest.approx(15.4, rel=1e-6)


def test_repeated_tokens_are_worth_less_and_less():
    law = dataclasses.replace(CHINCHILLA, repeats=15.4)
    few, many, new = (float(law.loss(1e9, d, 1e10)[0]) for d in (2e10, 1e13, 1e10))
    # one repetition is nearly as good as new tokens; a thousand are worth R* fresh passes
    assert few == pytest.approx(float(CHINCHILLA.loss(1e9, 2e10)[0]), rel=2e-3)
    assert many == pytest.approx(float(CHINCHILLA.loss(1e9, 1e10 * 16.4)[0]), rel=1e-9)
    assert many < few < new
    assert float(law.loss(1e9, 1e10, 1e11)[0]) == new  # more than are read: none is repeated


@pytest.mark.parametrize("repeats", [np.inf, None])
def test_derivatives_are_those_of_differences(repeats):
    data = grid(unique=4e9) if repeats is None else grid()
    problem = parametric._Problem(data, repeats)
    rng = np.random.default_rng(0)
    centre = problem.encode(dataclasses.replace(CHINCHILLA, repeats=10.0))
    for _ in range(4):
        theta = centre + 0.3 * rng.standard_normal(len(centre))
        theta[3:5] = np.abs(theta[3:5])
        _, jacobian = problem.residuals_and_jacobian(theta)
        for k, step in enumerate(1e-5 * np.eye(len(centre))):
            above, below = (problem.residuals_and_jacobian(theta + s)[0] for s in (step, -step))
            np.testing.assert_allclose(jacobian[:, k], (above - below) / 2e-5, atol=1e-9)


def random_starts(seed):
    return np.random.default_rng(seed).uniform([0, 0.05, 0.05], [0.95, 1.5, 1.5], (20, 3))


GRIDS = {
    "one": np.array([[0.5, 0.5, 0.5]]),
    "flat": np.array([[0.0, 0.1, 0.1], [0.9, 0.1, 0.1]]),
    "steep": np.array([[0.0, 1.5, 1.5], [0.3, 1.5, 0.1]]),
    "random": random_starts(0),
    "other": random_starts(1),
}


@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_every_grid_of_starts_ends_in_the_same_minimum(noise):
    data = grid(noise=noise)
    values = {k: parametric.fit(data, starts=v).objective for k, v in GRIDS.items()}
    whole = parametric.fit(data).objective
    np.testing.assert_allclose(list(values.values()), whole, rtol=1e-6)


def test_no_descent_of_scipy_goes_lower():
    data = grid(noise=0.01)
    found = parametric.fit(data)
    logs = [np.log(v) for v in (data.parameters, data.tokens, data.loss)]

    def objective(theta):  # written again, as in the paper
        e, a, b, alpha, beta = theta
        terms = np.stack([e + 0 * logs[0], a - alpha * logs[0], b - beta * logs[1]])
        return 1e4 * huber(1e-3, np.logaddexp.reduce(terms) - logs[2]).sum()

    law = found.law
    here = np.array([np.log(law.E), np.log(law.A), np.log(law.B), law.alpha, law.beta])
    assert objective(here) == pytest.approx(1e4 * found.objective, rel=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(3):
        start = here + rng.normal(0, [0.05, 1.0, 1.0, 0.05, 0.05])
        end = minimize(objective, start, method="L-BFGS-B", options={"maxiter": 3000})
        end = minimize(objective, end.x, method="Nelder-Mead", options={"maxiter": 5000})
        assert end.fun > objective(here) * (1 - 1e-6)


def test_constants_follow_the_units_and_the_law_does_not_change():
    data = grid(noise=0.01)
    thousands = dataclasses.replace(
        data, parameters=data.parameters / 1e6, tokens=data.tokens / 1e9, loss=2 * data.loss
    )
    a, b = parametric.fit(data), parametric.fit(thousands)
    one, two = a.law, b.law
    np.testing.assert_allclose(two.E, 2 * one.E, rtol=1e-6)
    np.testing.assert_allclose(two.A, 2 * one.A / 1e6**one.alpha, rtol=1e-5)
    assert two.alpha == pytest.approx(one.alpha, rel=1e-6)
    assert two.beta == pytest.approx(one.beta, rel=1e-6)
    np.testing.assert_allclose(a.residuals, b.residuals, atol=1e-8)


def test_a_descent_from_a_law_nearby_ends_where_the_search_does():
    data = grid()
    for noisy_data in intervals.draw(data, 0.01, 5, np.random.default_rng(0)):
        near, search = parametric.fit(noisy_data, starts=CHINCHILLA), parametric.fit(noisy_data)
        assert near.objective == pytest.approx(search.objective, rel=1e-8)
        assert near.law.beta == pytest.approx(search.law.beta, rel=1e-5)


def test_a_floor_of_zero_is_said_to_be_one():
    fit = parametric.fit(grid(dataclasses.replace(CHINCHILLA, E=1e-12), noise=0.001, seed=3))
    assert fit.law.E < 0.3
    made = grid(dataclasses.replace(CHINCHILLA, E=1e-12))
    assert analyse(made, source(), FEW).warnings


def test_the_optimum_is_the_lowest_of_its_budget():
    size, tokens = CHINCHILLA.optimum(1e21)
    assert 6 * size * tokens == pytest.approx(1e21)
    around = size * np.exp(np.linspace(-0.5, 0.5, 101))
    losses = CHINCHILLA.loss(around, 1e21 / 6 / around)
    assert int(np.argmin(losses)) == 50
    assert CHINCHILLA.parameters_exponent == pytest.approx(0.28 / 0.62)
    assert CHINCHILLA.parameters_exponent + CHINCHILLA.tokens_exponent == pytest.approx(1)


# ---- the frontier ----


def exponent(found, name):
    return powers.fit_power(found.flops, getattr(found, name)).exponent


def test_parabolas_through_isoflop_sets_find_the_optimum():
    found = frontier.isoflop(sets(span=0.5, num=5))
    want = [CHINCHILLA.optimum(c) for c in found.flops]
    assert len(found.flops) == 4
    np.testing.assert_allclose(found.parameters, [w[0] for w in want], rtol=0.01)
    np.testing.assert_allclose(found.tokens, [w[1] for w in want], rtol=0.01)
    np.testing.assert_allclose(found.loss, [float(CHINCHILLA.loss(*w)[0]) for w in want], rtol=1e-4)
    assert exponent(found, "parameters") == pytest.approx(0.28 / 0.62, abs=0.002)
    assert exponent(found, "tokens") == pytest.approx(0.34 / 0.62, abs=0.002)


def test_the_envelope_of_dense_curves_finds_the_exponents():
    dense = grid(sizes=np.geomspace(5e7, 1e10, 24), tokens=np.geomspace(1e8, 1e12, 60))
    found = frontier.envelope(dense)
    assert len(found.flops) > 100
    assert exponent(found, "parameters") == pytest.approx(0.28 / 0.62, abs=0.01)
    for flops, size in zip(found.flops, found.parameters, strict=True):
        best = CHINCHILLA.optimum(flops)[0]
        assert size / best == pytest.approx(1, abs=0.2)  # sizes are 26% apart


def test_a_table_without_isoflop_sets_is_cut_through_its_curves():
    found = frontier.slices(grid())
    assert len(found) == frontier.NUM_SLICES
    for cut in found:
        np.testing.assert_allclose(6 * cut.parameters * cut.tokens, cut.flops, rtol=1e-9)


def noisy(rng, n, d):
    return CHINCHILLA.loss(n, d) * np.exp(0.004 * rng.standard_normal(len(n)))


def test_sizes_that_differ_in_their_last_digits_are_one():
    made = unbalanced()
    assert len(np.unique(made.parameters)) > 240
    assert len(frontier.curves(made)) <= 43 and made.sizes().max() + 1 <= 43
    held = analyse(unbalanced(noisy), source(), FEW)
    assert len(held.data.parameters) == made.sizes().max() + 1
    assert groups(np.array([1.0005e9, 1e9, 3e9, 1.002e9])).tolist() == [0, 0, 2, 1]


def test_budgets_that_were_missed_by_some_percent_are_still_budgets():
    made = unbalanced()
    found = frontier.slices(made, law=CHINCHILLA)
    assert 9 <= len(found) <= 20
    assert sum(len(cut.parameters) for cut in found) > 120  # of 245 runs, several of one size
    for cut in found:
        assert len(cut.parameters) >= 5
        np.testing.assert_allclose(6 * cut.parameters * cut.tokens, cut.flops, rtol=1e-3)
        # every loss is that at the budget, not at the FLOPs of its runs
        expected = CHINCHILLA.loss(cut.parameters, cut.tokens)
        np.testing.assert_allclose(cut.loss, expected, rtol=2e-3)
    frontier_ = frontier.isoflop(made, law=CHINCHILLA)
    assert exponent(frontier_, "parameters") == pytest.approx(0.28 / 0.62, abs=0.01)


def test_parabolas_of_an_unbalanced_table_hold_the_exponent_in_their_interval():
    for seed in range(2):
        found = analyse(unbalanced(noisy, seed=seed), source(), Options(num_replicates=40))
        a = found.isoflop.parameters.exponent
        assert len(found.isoflop.points["flops"]) >= 8
        assert a.value == pytest.approx(0.28 / 0.62, abs=0.06)
        assert a.high - a.low < 0.2
        assert not any(w.startswith("isoflop") for w in found.warnings)


def test_few_small_exact_sets_are_found_too():
    found = frontier.slices(sets(num=3, span=0.3))
    assert [len(cut.parameters) for cut in found] == [3, 3, 3, 3]


def test_budgets_whose_best_size_is_the_smallest_or_largest_do_not_count():
    best = CHINCHILLA.optimum(1e20)[0]
    for sizes in (best * np.geomspace(2, 8, 5), best / np.geomspace(2, 8, 5)):
        c = np.repeat([1e20, 1.2e20], 5)
        n = np.tile(sizes, 2)
        made = Table(n, c / 6 / n, c, CHINCHILLA.loss(n, c / 6 / n), np.arange(10), "total")
        assert not len(frontier.isoflop(made).flops)
        assert math.isnan(exponent(frontier.isoflop(made), "parameters"))


def test_the_lowest_point_of_a_parabola_is_found_and_only_inside():
    x = np.geomspace(1, 100, 7)
    near, height = powers.parabola_minimum(x[::-1], 3 + np.log(x / 7)[::-1] ** 2)
    assert near == pytest.approx(7) and height == pytest.approx(3)
    assert math.isnan(powers.parabola_minimum(x, np.log(x / 1000) ** 2)[0])
    assert math.isnan(powers.parabola_minimum(x, -(np.log(x / 7) ** 2))[0])
    # a parabola that opens downwards; one that is lowest inside, but no point is
    assert math.isnan(powers.parabola_minimum(x[:5], np.array([1.0, 3.0, 0.9, 3.0, 1.0]))[0])
    assert math.isnan(powers.parabola_minimum(x[:3], np.array([1.0, 1.01, 1.5]))[0])


# ---- learning rate and batch ----


def swept(exponent=-0.3, edge=False):
    """A table with 5 learning rates for each of 4 sizes, best at 1e-2 (N / 1e6)^exponent."""
    sizes = np.repeat(np.geomspace(1e6, 1e8, 4), 5)
    best = 1e-2 * (sizes / 1e6) ** exponent
    rates = np.tile(1e-2 * 2.0 ** np.arange(-4, 1), 4)
    if edge:
        rates = rates / 64
    tokens = 20 * sizes
    loss = CHINCHILLA.loss(sizes, tokens) + 0.02 * np.log(rates / best) ** 2
    rows = np.arange(len(sizes))
    return Table(sizes, tokens, 6 * sizes * tokens, loss, rows, "total", learning_rate=rates)


def test_the_law_of_the_best_learning_rate_is_found_from_sweeps():
    found = settings.optima(swept(exponent=-0.3), "learning_rate", "parameters")
    assert found.kind == "swept"
    assert found.at_edge == 1  # for the smallest size the best is the largest that was tried
    law = powers.fit_power(found.x, found.best)
    assert law.exponent == pytest.approx(-0.3, abs=1e-6)
    assert law.at(1e6) == pytest.approx(1e-2, rel=1e-6)


def test_other_settings_are_at_their_best_for_each_learning_rate():
    one = swept()
    both = one.take(np.tile(np.arange(len(one)), 2))
    worse = np.repeat([0.0, 1.0], len(one)) * (1 + np.log(both.learning_rate) ** 2)
    batch = np.repeat([64.0, 128.0], len(one))
    made = dataclasses.replace(both, loss=both.loss + worse, batch_size=batch)
    a, b = (settings.optima(t, "learning_rate", "parameters") for t in (one, made))
    np.testing.assert_allclose(a.best, b.best)


def test_a_best_value_at_the_edge_of_its_sweep_does_not_count():
    found = settings.optima(swept(edge=True), "learning_rate", "parameters")
    assert found.at_edge == 4 and math.isnan(powers.fit_power(found.x, found.best).exponent)


def test_values_without_a_sweep_are_called_as_run():
    once = swept().take(np.arange(0, 20, 5))
    found = settings.optima(once, "learning_rate", "flops")
    assert found.kind == "as run"
    assert powers.fit_power(found.x, found.best).exponent == pytest.approx(0, abs=1e-12)


def test_a_law_of_the_loss_takes_the_best_setting_and_all_its_seeds():
    data = swept()
    twice = Table(
        **{
            f.name: np.concatenate([v, v]) if isinstance(v, np.ndarray) else v
            for f in dataclasses.fields(data)
            for v in [getattr(data, f.name)]
        }
    )
    best = twice.best()
    assert len(best) == 8  # 4 sizes, 2 seeds
    for size in np.unique(data.parameters):
        assert best.loss[best.parameters == size].max() == data.loss[data.parameters == size].min()


# ---- the whole analysis ----


@pytest.fixture(scope="module")
def result():
    return analyse(grid(noise=0.005), source(), Options(num_replicates=60))


def test_the_artefact_survives_json(result):
    text = artefact.to_json(result)
    again = artefact.from_json(text)
    assert artefact.to_json(again) == text
    assert constants(again.law).tolist() == constants(result.law).tolist()
    assert json.loads(text)["data"]["sha256"] == "0" * 64


def test_an_artefact_that_names_no_bootstrap_is_of_the_earlier_one(result):
    tree = json.loads(artefact.to_json(result))
    assert tree.pop("bootstrap") == "cases"
    assert "runs drawn with replacement" in report.fit_page(result)
    assert "Gaussian noise" in report.fit_page(artefact.from_json(json.dumps(tree)))


def test_an_exponent_that_rests_on_little_or_is_not_the_laws_is_warned_of(result):
    law = intervals.Estimate(0.5, 0.45, 0.55)

    def warnings(value, low, high, budgets=8):
        estimate = intervals.Estimate(value, low, high)
        power = artefact.LawEstimate(estimate, estimate, [])
        points = {"flops": [1.0] * budgets}
        found = artefact.FrontierEstimate(points, power, power)
        return artefact.disagreement({"isoflop": found}, law)

    assert warnings(0.52, 0.46, 0.58) == [] and warnings(np.nan, np.nan, np.nan, 0) == []
    [few] = warnings(0.52, 0.46, 0.58, budgets=3)
    assert "rests on 3 budgets" in few
    [wide] = warnings(0.678, 0.469, 1.002)  # of the public table, when four budgets were left
    assert wide.startswith("isoflop: N_opt ~ C^0.678 may be 0.469 to 1.002")
    [other] = warnings(0.62, 0.58, 0.66)
    assert "but the law says 0.500 [0.450, 0.550]" in other
    assert "no interval" in warnings(0.6, np.nan, np.nan)[0]


def test_another_format_is_refused(result):
    tree = json.loads(artefact.to_json(result))
    for wrong in ("{", "[]", "{}", json.dumps({**tree, "format": 2})):
        with pytest.raises(ValueError, match=r"artefact|JSON"):
            artefact.from_json(wrong)


def test_intervals_hold_the_estimate_and_the_truth_of_this_table(result):
    sure = analyse(grid(noise=0.005), source(), Options(num_replicates=200, level=0.99))
    for name in parametric.NAMES[:5]:
        found = result.constants[name]
        assert found.low < found.value < found.high
        assert sure.constants[name].low < getattr(CHINCHILLA, name) < sure.constants[name].high
    assert result.noise == pytest.approx(0.005, rel=0.3)
    assert result.exponents["a"].value + result.exponents["b"].value == pytest.approx(1)


def test_the_largest_size_is_predicted_by_the_smaller_ones(result):
    held = result.held_out
    assert held.parameters == SIZES[-1] and held.tokens == pytest.approx(TOKENS)
    assert abs(held.mean_error) < 0.005 and held.num_inside >= 4
    made = grid(noise=0.005)
    ours = made.parameters == SIZES[-1]
    made.loss[ours] *= 1.1  # another law beyond the rungs: seen in the error alone
    wrong = analyse(made, source(), FEW).held_out
    assert wrong.mean_error == pytest.approx((1 + held.mean_error) / 1.1 - 1, abs=1e-6)
    assert wrong.num_inside == 0


def test_more_noise_makes_intervals_wider_and_the_seed_repeats_them():
    quiet, loud, same = (
        analyse(grid(noise=n), source(), FEW).constants["alpha"] for n in (0.002, 0.01, 0.01)
    )
    assert loud.high - loud.low > 3 * (quiet.high - quiet.low)
    assert loud == same


# ---- tables that tell nothing ----


@pytest.mark.parametrize(
    "made, words",
    [
        (grid(sizes=SIZES[:1]), "1 size .*at least 3"),
        (grid(tokens=TOKENS[:2]), "2 token counts .*at least 3"),
        (grid().take(np.array([0, 1, 2, 6, 7, 8, 12])), "7 different pairs .*at least 8"),
    ],
)
def test_too_few_rows_are_refused_with_their_number(made, words):
    with pytest.raises(ValueError, match=words):
        analyse(made, source(), FEW)


@pytest.mark.parametrize("factor", [1 / math.log(2), math.log(2)])
def test_bits_among_nats_are_found(factor):
    made = grid(noise=0.01)
    made.loss[[4, 20]] *= factor
    with pytest.raises(ValueError, match=r"row 5 .*2 of 36.*a bit is 0\.6931 nats"):
        analyse(made, source(), FEW)


def test_a_correction_for_repeats_needs_repeats():
    for options in (Options(fits_repeats=True), Options(repeats=15.4)):
        with pytest.raises(ValueError, match="none of 36 rows"):
            analyse(grid(unique=1e15), source(), options)


def test_a_run_that_left_the_law_is_named():
    made = grid(noise=0.005, seed=1)
    assert not any("from the law" in w for w in analyse(made, source(), FEW).warnings)
    made.loss[7] *= 0.93  # learned something that the others have not
    [found] = [w for w in analyse(made, source(), FEW).warnings if "from the law" in w]
    assert found.startswith(f"row {made.rows[7]} (") and re.search(r"lies -[67]\.\d%", found)


def test_flops_counted_in_two_ways_are_warned_of():
    made = grid()
    made.flops[:18] *= 2
    found = analyse(made, source(), FEW).warnings
    assert any("6.00 to 12.00 x parameters x tokens" in w for w in found)
