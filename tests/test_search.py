"""Searches over plans: candidates, estimates, the fastest, the most rows, the smallest slice."""

import importlib.util
import math

import pytest

from lm.compiled import chips, interconnect, topology
from lm.compiled.costs import Work
from lm.compiled.memory import Memory
from lm.compiled.roofline import StepTimeBounds
from lm.config import conversion
from lm.parallel.sharding import AXES
from lm.planning import estimate as estimating
from lm.planning import plan, plausibility, report, search, sizing

needs_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"
)
GIB = 2**30


def made(total=0, *, rows=8, capacity=16 * GIB, refusal="", times=(1.0, 0.5), name="v5e:2x2"):
    """A Plan of made-up figures."""
    return plan.Plan(
        **{"name": "made", "topology": name, "step": "train", "num_devices": 4, "num_chips": 4},
        **{"mesh": {"fsdp": 4}, "rows": rows, "length": 32, "tokens": rows * 32},
        **{"parameters": 1000, "capacity": capacity, "refusal": refusal},
        **{"memory": Memory({"temporaries": total}, total, None, 0, (), ()), "transfers": ()},
        **{"work": Work(1e12, (), 1e9), "model_flops": 1e12, "peak_flops": 2e12},
        **{"times": StepTimeBounds(*times, {}, None, {}, max(times), sum(times), ())},
        **{"save": None, "warnings": ()},
        **{"compile_seconds": 1.0, "compile_cpu_seconds": 1.0},
    )


def test_every_candidate_divides_the_sizes_of_the_config(make_config):
    config = make_config({"model.num_kv_heads": 2, "data.batch_size": 16})
    found = list(search.candidates(config, 8))
    assert {c["mesh.tensor"] for c in found} == {1, 2}  # of two kv heads
    for c in found:
        shards = c["mesh.data"] * c["mesh.fsdp"]
        assert shards * c["mesh.tensor"] * c.get("mesh.stage", 1) == 8
        assert 16 % (shards * c["train.num_microbatches"]) == 0
    asked = conversion.resolve(config)
    for c in found[:: len(found) // 5]:
        assert search._replaced(asked, c) == conversion.resolve(plan.with_changes(config, c))


def test_an_axis_counts_where_the_model_has_use_for_it(make_config):
    def axes(changes):
        base = {"data.batch_size": 16, "model.dtype": "bfloat16"}
        found = list(search.candidates(make_config({**base, **changes}), 8))
        assert all(
            math.prod(c.get(f"mesh.{a}", 1) for a in AXES) == 8
            and c.get("model.pipeline.num_microbatches", 1) % c.get("mesh.stage", 1) == 0
            for c in found
        )
        return {a: {c.get(f"mesh.{a}", 1) for c in found} for a in AXES}

    short = axes({"model.num_layers": 4})
    assert short["sequence"] == short["expert"] == {1}
    assert short["stage"] == {1, 2, 4}
    long = {"data.length": 4 * search.SHORTEST, "model.max_length": 4 * search.SHORTEST}
    assert axes({**long, "model.num_layers": 3})["sequence"] == {1, 2, 4}
    assert axes({"model.num_layers": 3})["stage"] == {1}
    assert axes({"model.moe.num_experts": 4})["expert"] == {1, 2, 4}


def test_an_estimate_knows_bubbles_and_gathers_that_became_reductions(make_experiment):
    def of(name, changes=None, **axes):
        e = make_experiment({"model.dtype": "bfloat16", **(changes or {})}, **axes)
        target = topology.parse(name)
        grid = [interconnect.ChipCoord(0, (i // 4, i % 4, 0), 0) for i in range(8)]
        return estimating.estimate(e.config, e.batch_size, target, e.rules, coords=grid).parts

    staged = {"model.num_layers": 2, "model.pipeline.num_microbatches": 4}
    plain = of("v5p:2x4x1", {"model.num_layers": 2}, data=8)
    piped = of("v5p:2x4x1", staged, stage=2, data=4)
    assert piped["compute"] == pytest.approx(plain["compute"] * 5 / 4)  # of 5 iterations 1 idle
    few = of("v5p:2x4x1", fsdp=8)["fsdp"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimating, "WIDEST_GATHER", 4)
        assert of("v5p:2x4x1", fsdp=8)["fsdp"] == 2 * few


def test_an_estimate_grows_with_what_is_saved_and_what_is_sent(make_experiment):
    target = topology.parse("v5e:2x4")

    def of(changes=None, **axes):
        e = make_experiment({"model.dtype": "bfloat16", **(changes or {})}, **axes)
        grid = [interconnect.ChipCoord(0, (i // 4, i % 4), 0) for i in range(8)]
        return estimating.estimate(e.config, e.batch_size, target, e.rules, coords=grid)

    saving = [of({"model.remat": r}, fsdp=8) for r in ("full", "projections", "none")]
    assert saving[0].memory < saving[1].memory < saving[2].memory
    assert saving[0].parts["compute"] > saving[2].parts["compute"]
    again = of({"train.num_microbatches": 2}, fsdp=8)
    assert again.parts["fsdp"] == 2 * saving[2].parts["fsdp"]
    assert of(fsdp=4, data=2).memory > of(fsdp=8).memory


@needs_tpu
def test_a_search_estimates_frozen_parameters_without_gradients_and_moments(make_config):
    """As with adapters: less memory, and less time of products and of sums over the mesh."""

    def estimates(changes):
        found = []
        with pytest.MonkeyPatch.context() as patch:
            real = search.estimate
            patch.setattr(
                search, "estimate", lambda *a, **k: found.append(real(*a, **k)) or found[-1]
            )
            config = make_config({"mesh.data": -1, "model.dtype": "bfloat16", **changes})
            search.search(config, "v5e:2x2", lambda *_: made())
        return found

    pairs = list(zip(estimates({}), estimates({"optimizer.frozen": ("layers.*",)}), strict=True))
    for whole, part in pairs:
        assert part.memory < whole.memory
        assert part.parts["compute"] < whole.parts["compute"]
        assert all(part.parts[a] < t for a, t in whole.parts.items() if a in ("data", "fsdp"))
    adapted = estimates({"model.lora.rank": 2})
    assert max(e.memory for e in adapted) < max(whole.memory for whole, _ in pairs)


def test_the_search_refuses_a_model_whose_step_it_cannot_estimate():
    config = conversion.default(model="lstm")
    with pytest.raises(ValueError, match=r"transformers only; config\.model is .*lm\.models\.lstm"):
        search.search(config, "cpu:8", lambda *_: None)


@needs_tpu
def test_a_search_in_a_type_without_a_peak_names_the_flag_of_one_that_has_it(make_config):
    wanted = r"config\.model\.dtype \(float32\): no published peak for v5e in it; "
    with pytest.raises(ValueError, match=wanted + "--config.model.dtype=bfloat16 has a published"):
        search.search(make_config({"mesh.data": -1}), "v5e:2x2", lambda *_: None)


def test_a_chip_without_any_peak_names_no_flag():
    assert chips.CHIPS["cpu"].dtype_with_peak() == ""


def test_the_search_names_a_winner_and_why_the_others_lost(make_config):
    """With plans of known times: the fastest that fits wins, one that doesn't never."""

    def make(config):
        refusal = "too large" if config.mesh.fsdp == 4 else ""
        return made(refusal=refusal, times=(1.0 + config.mesh.tensor, 0.5))

    config = make_config({"model.dtype": "bfloat16", "model.num_kv_heads": 2})
    changes = (
        {"mesh.data": 1, "mesh.fsdp": 4},
        {"mesh.data": 2, "mesh.fsdp": 1, "mesh.tensor": 2},
        {"mesh.data": 4, "mesh.fsdp": 1, "mesh.tensor": 1},
    )
    tried = [plan.Trial(str(c), make(plan.with_changes(config, c))) for c in changes]
    found = search.judge(tried, {"far slower": 3})
    assert found.winner is tried[2] and found.winner.remarks == ()
    slower, refused = found.trials[1:]
    assert slower.flags == tried[1].flags and refused == tried[0]
    assert slower.remarks == ("+44% time: compute takes 3.000 s, not 2.000 s",)
    page = report.trials_page(found)
    assert page.index(f"* {tried[2].flags}\n      fits") < page.index(f"  {tried[1].flags}\n")
    assert f"{tried[0].flags}\n      DOES NOT FIT" in page and "3 candidates far slower" in page
    none = search.judge(tried[:1], {})
    assert none.winner is None and "nothing that was tried fits" in report.trials_page(none)


# ---- sizes ----


def by_rows(used, seen):
    """A `Make` whose plans use `used(rows)` bytes; `seen` lists the rows that were compiled."""

    def make(config, name, decode):
        rows = decode.batch_size if decode else config.data.batch_size
        seen.append(rows)
        return made(used(rows), rows=rows, name=name)

    return make


@needs_tpu
@pytest.mark.parametrize("per_row, most", [(0.1, 128), (3.7, 4), (15.0, 1)])
def test_the_largest_batch_is_found_from_a_line_through_few_plans(make_config, per_row, most):
    """1 GiB and so much a row of each of 4 shards: the largest power of two within 16 GiB."""
    seen = []
    make = by_rows(lambda rows: int((1 + per_row * rows / 4) * GIB), seen)
    found = sizing.largest_batch(make_config({"mesh.data": -1}), "v5e:2x2", make)
    assert found.winner.flags == f"--config.data.batch_size={4 * most}"
    assert len(seen) == len(set(seen)) <= 4
    # the next larger one was tried, and is told
    assert f"--config.data.batch_size={8 * most}\n      DOES NOT FIT" in report.trials_page(found)


@needs_tpu
def test_the_largest_batch_of_decoding_counts_its_own_rows(make_config):
    seen = []
    make = by_rows(lambda rows: rows * GIB, seen)
    config = make_config({"mesh.data": -1})
    found = sizing.largest_batch(config, "v5e:2x2", make, decode=plan.Decode(8, 32))
    assert found.winner.flags == "--decode-batch=16" and found.winner.plan.rows == 16
    none = sizing.largest_batch(config, "v5e:2x2", by_rows(lambda _: 17 * GIB, seen))
    assert none.winner is None and "nothing that was tried fits" in report.trials_page(none)


@needs_tpu
def test_slices_that_cannot_hold_the_state_are_not_compiled(make_config):
    """1 and 4 chips cannot; 8 hold it, with one row of a shard at a time."""
    seen = []

    def make(config, name, decode):
        seen.append((name, config.train.num_microbatches))
        fits = name == "v5e:2x4" and config.train.num_microbatches == 4
        return made(GIB if fits else 20 * GIB, rows=32, name=name)

    # 2^32 float32 parameters, two moments and an average of each: 64 GiB
    sizes = {"model.vocab_size": 2**20, "model.embed_dim": 4096, "model.head_dim": 4}
    sizes |= {"mesh.data": 1, "mesh.fsdp": -1, "data.batch_size": 32, "optimizer.ema_decay": 0.9}
    found = sizing.fewest_chips(make_config(sizes), "v5e:16x16", make)
    assert seen == [("v5e:2x4", 1), ("v5e:2x4", 4)]
    assert found.winner.flags == "--topology=v5e:2x4 --config.train.num_microbatches=4"
    refused = [t.remarks[0] for t in found.trials[:2]]
    assert "alone take 64.0 of 15.8 GiB" in refused[0]
    assert "alone take 16.0 of 15.8 GiB" in refused[1]


@needs_tpu
@pytest.mark.parametrize(
    "name, smallest",
    [("v5e:16x16", "v5e:1x1"), ("v5p:4x4x4", "v5p:1x1x1"), ("v4:4x4x4", "v4:2x2x1")],
)
def test_a_slice_of_one_chip_is_the_smallest_where_it_is_on_offer(make_config, name, smallest):
    found = sizing.fewest_chips(make_config({"mesh.data": -1}), name, lambda *a: made(name=a[1]))
    assert found.winner is not None and found.winner.flags == f"--topology={smallest}"


def test_a_plan_that_cannot_be_right_is_no_reason_for_a_larger_slice(make_config):
    def make(*_):
        raise plausibility.ImplausiblePlan("not understood")

    with pytest.raises(plausibility.ImplausiblePlan):
        sizing.fewest_chips(make_config({"mesh.data": -1}), "cpu:8", make)


def test_slices_whose_sizes_do_not_divide_are_told(make_config):
    config = make_config({"mesh.data": -1, "mesh.tensor": 2})
    found = sizing.fewest_chips(config, "cpu:8", lambda _, name, __: made(name=name))
    assert found.winner is not None and found.winner.flags == "--topology=cpu:2"
    assert "tensor" in found.trials[0].remarks[0] and found.trials[0].plan is None
