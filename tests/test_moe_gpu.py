"""Mixtures of experts on GPUs: the kernels' numbers, interpreted, against a loop over groups, the
dispatch around them, and, with `-m compilers`, what the GPU compiler makes of them.
"""

import functools
import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lm.kernels import grouped_matmul_gpu
from lm.kernels.grouped_matmul import grouped_matmul
from lm.layers.linear import Matrix
from lm.layers.moe.dispatch import dropless
from lm.parallel.sharding import Rules
from lm.reliability.experts_check import check_experts

# of the largest element: sums in float32, in bfloat16 rounded once
TOLERANCES = {"float32": 1e-6, "bfloat16": 2.0**-8}


@pytest.fixture
def on_gpu(monkeypatch):
    """Meshes say that they are of GPUs, whose kernels are interpreted."""
    monkeypatch.setattr(Rules, "platform", property(lambda self: "gpu"))
    for name in ("rows_by_group", "matrices_by_group"):
        kernel = functools.partial(getattr(grouped_matmul_gpu, name), interpret=True)
        monkeypatch.setattr(grouped_matmul_gpu, name, kernel)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((300, 40, 136), (3, 0, 130, 127)),  # dimensions that no tile divides, and rows of no group
        ((257, 128, 128), (0, 256, 1)),
        ((5, 32, 8), (0, 0)),
    ],
    ids=["uneven", "even", "empty"],
)
def test_kernels_are_products_of_each_group(on_gpu, shape, sizes, dtype):
    (rows, depth, width), count, rng = shape, sum(sizes), np.random.default_rng(0)
    x, w, dy = (
        jnp.asarray(rng.normal(size=size), dtype)
        for size in ((rows, depth), (len(sizes), depth, width), (rows, width))
    )
    # rows of no group hold what other kernels left in them
    x, dy = (a.at[count:].set(jnp.nan) for a in (x, dy))

    @jax.jit
    def run(x, w, dy):
        y, pullback = jax.vjp(lambda x, w: grouped_matmul("gpu", 1.0, x, w, jnp.array(sizes)), x, w)
        return y, *pullback(dy)

    found = run(x, w, dy)
    assert [a.dtype for a in found] == [jnp.dtype(dtype)] * 3
    a, m, d = (np.asarray(z, np.float64) for z in (x, w, dy))
    group = np.repeat(np.arange(len(sizes)), sizes)
    each = [np.flatnonzero(group == g) for g in range(len(sizes))]
    expected = (
        np.einsum("rd,rdf->rf", a[:count], m[group]),
        np.einsum("rf,rdf->rd", d[:count], m[group]),
        np.stack([a[rows].T @ d[rows] for rows in each]),
    )
    for z, e in zip(found, expected, strict=True):
        z = np.asarray(z, np.float64)[: len(e)]
        assert z.shape == e.shape
        atol = TOLERANCES[dtype] * np.abs(e).max(initial=0.0)
        np.testing.assert_allclose(z, e, rtol=0, atol=atol)


def test_tiles_cover_the_rows_of_every_group_once():
    sizes = np.array([1, 0, 128, 129, 0, 300], np.int32)
    count = 600 // grouped_matmul_gpu.ROWS + len(sizes)
    group, start, end = map(np.asarray, grouped_matmul_gpu._tiles(jnp.asarray(sizes), count))
    seen = np.zeros(600, int)
    for g, first, stop in zip(group, start, end, strict=True):
        rows = np.arange(first, min(first + grouped_matmul_gpu.ROWS, stop))
        assert set(np.repeat(np.arange(6), sizes)[rows]) <= {g}
        seen[rows] += 1
    assert (seen[: sizes.sum()] == 1).all() and not seen[sizes.sum() :].any()


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_check_at_the_start_of_a_run_passes_the_kernels(on_gpu, rules_on, dtype):
    assert 0 < check_experts(jnp.dtype(dtype), rules_on()) < 0.7


EXPERTS = 16


def outputs(rules, dtype, chosen):
    """(y, its gradients) of a layer's experts."""
    rng = np.random.default_rng(1)
    b, t, k = chosen.shape
    x, weights, cotangent = (
        jnp.asarray(rng.normal(size=(b, t, n)), kind)
        for n, kind in ((16, dtype), (k, jnp.float32), (16, dtype))
    )
    shapes = {"up": (16, 24), "gate": (16, 24), "down": (24, 16)}
    experts = {n: jnp.asarray(rng.normal(size=(EXPERTS, *s)) / 4, dtype) for n, s in shapes.items()}

    def apply(x, weights, experts):
        experts = {name: Matrix(weight) for name, weight in experts.items()}
        return dropless(x, chosen, weights, experts, "swiglu", rules)

    @jax.jit
    def run(x, weights, experts):
        y, pullback = jax.vjp(apply, x, weights, experts)
        return y, pullback(cotangent)

    return jax.device_get(run(x, weights, experts))


@pytest.mark.parametrize(
    ("dtype", "axes", "skewed"),
    [
        ("bfloat16", {"expert": 4, "fsdp": 2}, False),
        ("float32", {"expert": 8}, True),
        pytest.param("float32", {}, False, marks=pytest.mark.slow),
        pytest.param("bfloat16", {"expert": 8}, True, marks=pytest.mark.slow),
        pytest.param("bfloat16", {"expert": 2, "tensor": 4}, False, marks=pytest.mark.slow),
    ],
)
def test_the_layer_of_gpus_is_that_of_other_platforms(request, rules_on, dtype, axes, skewed):
    """Also where all tokens want the two experts of one of eight shards."""
    rng = np.random.default_rng(0)
    scores = rng.random((8, 16, EXPERTS))
    scores[..., 2:4] += skewed
    chosen = np.argsort(-scores, axis=-1)[..., :2].astype(np.int32)
    assert not skewed or set(chosen.flat) == {2, 3}
    chosen[rng.random((8, 16)) < 0.15] = EXPERTS  # padding
    other = outputs(rules_on(), dtype, jnp.asarray(chosen))
    request.getfixturevalue("on_gpu")
    found = outputs(rules_on(**axes), dtype, jnp.asarray(chosen))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(other), jax.tree.leaves(found), strict=True
    ):
        a, b = (np.asarray(z, np.float32) for z in (a, b))
        # beside its product, a gradient in bfloat16 is rounded at the two before it, and a shard's
        atol = 4 * TOLERANCES[dtype] * np.abs(a).max()
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(b, a, rtol=0, atol=atol, err_msg=name)


def test_no_loop_of_gpus_has_a_length_that_is_data(on_gpu, rules_on):
    """With eight shards of experts the tokens are taken in two parts, by a scan."""
    rules, chosen = rules_on(expert=8), jnp.zeros((8, 16, 2), jnp.int32)
    experts = {"up": jnp.zeros((EXPERTS, 16, 24)), "down": jnp.zeros((EXPERTS, 24, 16))}

    def loops(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("while", "cond", "scan"):
                yield eqn.primitive.name, eqn.params.get("length")
            if eqn.primitive.name != "pallas_call":  # whose loops are the kernel's own
                for inner in jaxprs_in_params(eqn.params):
                    yield from loops(inner)

    def loss(x, weights, experts):
        experts = {name: Matrix(weight) for name, weight in experts.items()}
        return jnp.sum(dropless(x, chosen, weights, experts, "relu", rules))

    grad = jax.grad(loss, (0, 1, 2))
    arrays = jnp.zeros((8, 16, 16)), jnp.zeros((8, 16, 2)), experts
    assert list(loops(jax.make_jaxpr(grad)(*arrays).jaxpr)) == [("scan", 2)] * 2


COMPILE = """
    import json, re, sys
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    from lm.config.schema import MeshConfig
    from lm.layers.block_config import BlockConfig
    from lm.layers.moe.moe import Moe, MoeConfig
    from lm.kernels.quantization import QuantizationConfig
    from lm.parallel.sharding import make_rules
    from lm.compiled import costs, hlo, topology

    count, B, T, D, F = int(sys.argv[1]), 8, 512, 256, 128
    quantization = QuantizationConfig(sys.argv[2])
    devices = topology.devices(topology.parse(f"h100:{count}"))
    rules = make_rules(MeshConfig(data=1, expert=count), devices)
    moe = MoeConfig(num_experts=32, num_experts_per_token=4, mlp_dim=F)
    config = BlockConfig(
        embed_dim=D, moe=moe, activation="swiglu", dtype="bfloat16", quantization=quantization
    )
    model = Moe(config, rules)
    S = jax.ShapeDtypeStruct
    x = S((B, T, D), jnp.bfloat16, sharding=rules.sharding("batch", None, None))
    filled = S((B, T), bool, sharding=rules.sharding("batch", None))
    boxed = jax.eval_shape(model.init, jax.random.key(0), x, filled)["params"]
    params = jax.tree.map(
        lambda a, s: S(a.shape, a.dtype, sharding=s), nn.meta.unbox(boxed), rules.shardings(boxed)
    )

    def loss(params, x, filled):
        y, _ = model.apply({"params": params}, x, filled)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, x, filled).compile()
    module = hlo.of_compiled(compiled)
    found = {"loops": [], "kernels": {}, "conditionals": 0, "largest": 0}
    for visit in hlo.walk(module.entry):
        i = visit.instruction
        if i.opcode == "while":
            found["loops"].append(hlo.trip_count(i))
        if i.opcode == "conditional":
            found["conditionals"] += 1
        if "triton" in i.target:
            name = re.search(rb'name = "(\\w+)"', i.proto.backend_config)[1].decode()
            found["kernels"][name] = found["kernels"].get(name, 0) + 1
        if i.opcode not in ("parameter", "tuple", "get-tuple-element"):
            found["largest"] = max([found["largest"], *(s.bytes for s in i.shapes)])
    work = costs.count_flops_and_hbm_bytes(module)
    found |= {"flops": work.flops, "narrow": work.narrow_flops, "unknown": work.unknown}
    print(json.dumps(found))
"""


@pytest.mark.compilers
@pytest.mark.parametrize(
    ("count", "quantization"), [(1, "none"), (8, "none"), (1, "int8"), (1, "fp8"), (8, "int8")]
)
def test_the_gpu_compiler_makes_grouped_products(count, quantization):
    """In 32 experts a dense masked product is 8 times the FLOPs, and each row of its operands."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("needs the GPU compiler: pip install -e '.[gpu]'")
    run = [sys.executable, "-c", textwrap.dedent(COMPILE), str(count), quantization]
    done = subprocess.run(run, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # forward and two gradients; shards of experts save their inputs alone, and compute it again
    products = {"grouped_rows": 6, "grouped_matrices": 3}
    if count == 8:
        products["grouped_rows"] += 3
    largest = found["kernels"].pop("grouped_largest", 0)
    assert largest == (0 if quantization == "none" else 3)
    assert found["kernels"] == products
    assert found["loops"] == [2] * (2 if count == 8 else 0) and not found["conditionals"]
    rows, width, hidden = 8 * 512 * 4, 256, 128
    needed = 2 * rows * width * hidden * sum(products.values()) / count
    assert not found["unknown"] and needed <= found["flops"] < 1.2 * needed  # the router, too
    in_8_bits = {"none": {}, "int8": {"s8": 1}, "fp8": {}}[quantization]
    assert found["narrow"] == {
        kind: pytest.approx(part * needed) for kind, part in in_8_bits.items()
    }
    assert found["largest"] <= 4 * rows * width
