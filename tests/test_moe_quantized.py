"""Experts' products in 8 and 4 bits: against the product of each expert alone, on one device and on
eight, by the kernels of GPUs (interpreted), and, with `-m compilers`, in compiled programs.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from jax.extend.core import jaxprs_in_params

from lm.kernels import grouped_matmul_gpu
from lm.kernels import quantized_grouped_matmul as quantized
from lm.kernels.quantization import QuantizationConfig, quantize, quantized_product
from lm.kernels.quantized_grouped_matmul import quantized_by_expert, quantized_grouped_matmul
from lm.layers.block_config import BlockConfig
from lm.layers.moe.moe import Moe, MoeConfig
from lm.parallel.sharding import Rules
from lm.reliability.experts_check import check_experts
from lm.reliability.reference import SelfCheckFailed

FORMATS = [("int8", "row"), ("int8", "tensor"), ("fp8", "row"), ("fp8", "tensor")]
SIZES = (3, 0, 130, 67)  # none, less than a tile of a kernel, more than one
R, D, F = 212, 64, 160  # 12 rows of no group


@pytest.fixture
def on_gpu(monkeypatch):
    """Meshes say that they are of GPUs, whose kernels are interpreted."""
    monkeypatch.setattr(Rules, "platform", property(lambda self: "gpu"))
    for name in ("rows_by_group", "matrices_by_group", "largest_by_group"):
        kernel = functools.partial(getattr(grouped_matmul_gpu, name), interpret=True)
        monkeypatch.setattr(grouped_matmul_gpu, name, kernel)


@pytest.fixture(scope="module")
def arrays():
    """x: [R, D], weights: [G, D, F], dy: [R, F], of uneven rows, columns and experts; NaN beyond
    the groups.
    """
    rng, count = np.random.default_rng(0), sum(SIZES)

    def uneven(*shape):
        values = rng.normal(size=shape)
        for i in range(len(shape)):
            sizes = [n if axis == i else 1 for axis, n in enumerate(shape)]
            values *= 4.0 ** rng.normal(size=sizes)
        return values.astype(np.float32)

    x, weights, dy = uneven(R, D), 0.02 * uneven(len(SIZES), D, F), 1e-4 * uneven(R, F)
    x[count:], dy[count:] = np.nan, np.nan
    return x, weights, dy


def grouped(platform, config, x, weights, dy):
    """(y, dx, d_weights), y and dx without the rows beyond the groups."""

    @jax.jit
    def run(x, weights, dy):
        product = functools.partial(quantized_grouped_matmul, config, platform, 1.0)
        sizes = jnp.array(SIZES, jnp.int32)
        y, pullback = jax.vjp(lambda x, weights: product(x, weights, sizes), x, weights)
        return y, *pullback(dy)

    y, dx, d_weights = run(*(jnp.asarray(a) for a in (x, weights, dy)))
    return y[: sum(SIZES)], dx[: sum(SIZES)], d_weights


def one_by_one(config, x, weights, dy):
    """The same by `quantized_product` of each expert."""

    @jax.jit
    def run(x, weight, dy):
        y, pullback = jax.vjp(functools.partial(quantized_product, config), x, weight)
        return y, *pullback(dy)

    parts, start = [], 0
    for size, weight in zip(SIZES, weights, strict=True):
        rows = slice(start, start + size)
        if size:
            parts.append(run(*(jnp.asarray(a) for a in (x[rows], weight, dy[rows]))))
        else:
            parts.append((x[rows] @ weight, dy[rows] @ weight.T, jnp.zeros_like(weight)))
        start += size
    y, dx, d_weights = zip(*parts, strict=True)
    return jnp.concatenate(y), jnp.concatenate(dx), jnp.stack(d_weights)


def assert_same(found, wanted, tolerance):
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (np.asarray(z, np.float64) for z in (a, b))
        if tolerance == 0:
            np.testing.assert_array_equal(a, b)
        # of the largest of each column, as columns differ in size
        assert np.all(np.abs(a - b) <= tolerance * np.abs(b).max(-2, keepdims=True))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(("name", "scales"), FORMATS)
@pytest.mark.parametrize("weight_gradients", [True, False])
def test_grouped_products_are_those_of_each_expert(
    on_gpu, arrays, platform, name, scales, weight_gradients
):
    """int8 is summed as int32: equal in bits. Rows beyond the groups, NaN, are in no scale."""
    config = QuantizationConfig(name, scales, weight_gradients)
    found, wanted = grouped(platform, config, *arrays), one_by_one(config, *arrays)
    exact = name == "int8" and weight_gradients
    assert_same(found, wanted, 0 if exact else 1e-6)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_in_bfloat16_the_result_is_rounded_once_more(on_gpu, arrays, platform, name):
    config, in_16_bits = QuantizationConfig(name), [jnp.asarray(a, jnp.bfloat16) for a in arrays]
    found = grouped(platform, config, *in_16_bits)
    wanted = grouped(platform, config, *(a.astype(jnp.float32) for a in in_16_bits))
    assert all(a.dtype == jnp.bfloat16 for a in found)
    assert_same([a.astype(jnp.float32) for a in found], wanted, 2.0**-8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "scales"), [*FORMATS, ("mxfp8", "row"), ("nvfp4", "row")])
def test_the_check_at_the_start_of_a_run_passes_them(on_gpu, rules_on, name, scales, dtype):
    config = QuantizationConfig(name, scales, weight_gradients=name in ("int8", "fp8"))
    assert check_experts(jnp.dtype(dtype), rules_on(), config) < 0.7


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_the_check_finds_a_scale_of_rows_beyond_the_groups(rules_on, name, monkeypatch):
    def of_all(config, x, sizes, is_gradient=False):
        whole = quantize(config, x, (0, 1), is_gradient)
        return qwix.QArray(whole.qvalue, jnp.broadcast_to(whole.scale, (len(x), 1)))

    monkeypatch.setattr(quantized, "_rows", of_all)
    config = QuantizationConfig(name, "tensor")
    with pytest.raises(SelfCheckFailed, match=f"products of experts in {name} differs"):
        check_experts(jnp.dtype("bfloat16"), rules_on(), config)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_formats_in_blocks_are_those_of_each_expert(on_gpu, arrays, platform, name):
    config = QuantizationConfig(name, weight_gradients=False)
    assert_same(grouped(platform, config, *arrays), one_by_one(config, *arrays), 1e-6)


@pytest.mark.parametrize(("name", "scales"), FORMATS)
def test_slots_of_a_capacity_are_rows_of_each_expert(arrays, name, scales):
    """Also slots that nothing fills, which are zeros."""
    config, rng = QuantizationConfig(name, scales), np.random.default_rng(1)
    rows = rng.normal(size=(2, 4, 5, D)).astype(np.float32)
    rows[:, 1], rows[0, 2, 3:] = 0, 0
    weights, dy = arrays[1], rng.normal(size=(2, 4, 5, F)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(product, *arrays):
        y, pullback = jax.vjp(product, *arrays[:2])
        return y, *pullback(arrays[2])

    y, dx, d_weights = run(functools.partial(quantized_by_expert, config), rows, weights, dy)
    for e in range(4):
        alone = functools.partial(quantized_product, config)
        wanted = run(alone, rows[:, e], weights[e], dy[:, e])
        found = y[:, e], dx[:, e], d_weights[e]
        assert_same(found, wanted, 0 if name == "int8" else 1e-6)


SHAPE = (8, 16, 32)  # of the layer's input, [B, T, D]


def layer(rules, dispatch, quantization, dtype="float32"):
    moe = MoeConfig(num_experts=8, num_experts_per_token=3, mlp_dim=64, dispatch=dispatch)
    config = BlockConfig(
        embed_dim=SHAPE[-1],
        moe=moe,
        activation="swiglu",
        dtype=dtype,
        init_std=0.3,
        quantization=quantization,
    )
    return Moe(config, rules)


def loss_of(model, filled, params, x):
    y, _ = model.apply({"params": params}, x, filled)
    return jnp.sum(jnp.sin(y)), y


def outputs(rules, dispatch, quantization):
    """(y, the gradients of the parameters and of x) of a layer, some of its tokens padding."""
    rng, model = np.random.default_rng(0), layer(rules, dispatch, quantization)
    x, filled = rng.normal(size=SHAPE).astype(np.float32), rng.random(SHAPE[:2]) < 0.85
    boxed = jax.jit(model.init)(jax.random.key(0), x, filled)["params"]
    params = jax.device_put(nn.meta.unbox(boxed), rules.shardings(boxed))
    x = jax.device_put(x, rules.sharding("batch", None, None))
    run = jax.jit(jax.grad(functools.partial(loss_of, model, filled), (0, 1), has_aux=True))
    grads, y = jax.device_get(run(params, x))
    return y, grads


def distances(found, wanted):
    return jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), found, wanted)


MESHES = {"expert8": {"expert": 8}, "expert2_tensor2_fsdp2": {"expert": 2, "tensor": 2, "fsdp": 2}}
CASES = itertools.product(MESHES, ["dropless", "capacity"], ["int8", "fp8"], [False, True])


@pytest.mark.parametrize(
    ("mesh", "dispatch", "name", "gpu"),
    [
        ("expert8", "dropless", "int8", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in list(CASES)[1:]),
    ],
)
def test_shards_of_experts_multiply_what_one_device_does(
    request, rules_on, mesh, dispatch, name, gpu
):
    """But for sums in another order, by which a few numbers fall on the other side of the middle of
    two integers: each of these is a difference of one step of rounding, which all numbers have in
    `rounding`. Devices that share an expert have scales of their own, of a part of its width, and,
    for gradients of matrices, of its rows: other roundings everywhere.
    """
    config = QuantizationConfig(name)
    one, plain = outputs(rules_on(), dispatch, config), outputs(rules_on(), dispatch, NONE)
    if gpu:
        request.getfixturevalue("on_gpu")
    eight = outputs(rules_on(**MESHES[mesh]), dispatch, config)
    rounding, found = distances(one, plain), distances(eight, one)
    near = 1e-2 if mesh == "expert8" else 1.5
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(rounding), strict=True
    ):
        assert b > 1e-3 and a < near * b, (jax.tree_util.keystr(path), a, b)


NONE = QuantizationConfig()


def products(jaxpr):
    """(name, types of both operands) of every product of two matrices in a jaxpr."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "ragged_dot_general"):
            kinds = (v.aval.dtype.name for v in equation.invars[:2])
            yield equation.primitive.name, *kinds
        for sub in jaxprs_in_params(equation.params):
            yield from products(getattr(sub, "jaxpr", sub))


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
@pytest.mark.parametrize("weight_gradients", [True, False])
def test_all_products_of_experts_are_quantized_and_the_router_is_not(
    rules_on, dispatch, weight_gradients
):
    model = layer(rules_on(), dispatch, QuantizationConfig("int8", "row", weight_gradients))
    x, filled = jnp.zeros(SHAPE), np.ones(SHAPE[:2], bool)
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), x, filled)["params"])
    grad = jax.grad(functools.partial(loss_of, model, filled), (0, 1), has_aux=True)
    found = list(products(jax.make_jaxpr(grad)(params, x).jaxpr))
    kind = "ragged_dot_general" if dispatch == "dropless" else "dot_general"
    assert found.count((kind, "int8", "int8")) == (9 if weight_gradients else 6)
    rest = [of for of in found if of[1] != "int8"]
    router = [("dot_general", "float32", "float32")] * 3
    in_float32 = [(kind, "float32", "float32")] * (0 if weight_gradients else 3)
    assert sorted(rest) == sorted(router + in_float32)


def test_blocks_of_rows_of_several_experts_are_refused(make_experiment):
    changes = {"model.quantization.format": "mxfp8", "model.embed_dim": 32, "model.mlp_dim": 64}
    changes |= {"model.moe.num_experts": 4, "model.moe.mlp_dim": 48}
    message = r"config.model.quantization.weight_gradients \(True\) must be False for .*mxfp8"
    with pytest.raises(ValueError, match=message):
        make_experiment(changes)
    changes["model.quantization.weight_gradients"] = False
    with pytest.raises(ValueError, match=r"config.model.moe.mlp_dim \(48\) must be divisible"):
        make_experiment(changes)
    make_experiment({**changes, "model.moe.mlp_dim": 64})
