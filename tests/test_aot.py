"""A plan's reading of a compiled program, against formulas and the compiler's totals."""

import collections
import copy
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lm.compiled import (
    buffers,
    chips,
    compiling,
    costs,
    gpus,
    hlo,
    interconnect,
    memory,
    protos,
    roofline,
    topology,
    traffic,
)
from lm.compiled.roofline import StepTimeBounds
from lm.config import conversion
from lm.models import flops
from lm.planning import estimate, plan, plausibility, report, save_cost, shards
from lm.training.experiment import Experiment

try:  # XLA's parser of HLO texts
    from jaxlib import _hlo as xla
except ImportError:  # jaxlib 0.10.0
    from jaxlib import _jax as xla

needs_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"
)
B, D, F = 16, 32, 64  # rows, width, hidden width of the toys
ITEM = 4  # bytes of a float32


@functools.cache
def mesh_of(**axes):
    devices = np.array(jax.devices()[: math.prod(axes.values())])
    return Mesh(devices.reshape(tuple(axes.values())), tuple(axes))


def module_of(text):
    serialized = xla.hlo_module_from_text(text).as_serialized_hlo_module_proto()
    return hlo.read(protos.message("HloModuleProto").FromString(serialized))


def program_of(f, mesh, **arrays):
    """(module, collectives) of f over arrays given as name=(shape, spec)."""
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in arrays.values()
    ]
    module = hlo.of_compiled(jax.jit(f).lower(*shapes).compile())
    return module, traffic.collectives(module, mesh.shape)


def sums(collectives):
    totals = collections.Counter()
    for c in collectives:
        totals[c.kind, c.axis] += c.bytes
    return dict(totals)


# ---- traffic ----


@pytest.mark.parametrize("layers", [1, 5])
def test_fsdp_gathers_every_layer_once_in_a_forward_pass(layers):
    """An all-gather of each layer's matrix sends (n - 1) / n of it, as often as the loop runs."""
    mesh = mesh_of(data=1, fsdp=4)

    def forward(x, stack):
        def layer(x, weight):
            whole = jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, P()))
            return jnp.tanh(x @ whole), None

        return jax.lax.scan(layer, x, stack)[0]

    x, stack = ((B, D), P("fsdp")), ((layers, D, D), P(None, "fsdp"))
    _, found = program_of(forward, mesh, x=x, stack=stack)
    assert sums(found) == {("all-gather", "fsdp"): layers * D * D * ITEM * 3 / 4}


def test_fsdp_sums_gradients_over_its_axis():
    mesh = mesh_of(data=1, fsdp=4)

    def gradient(x, weight):
        grad = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(weight)
        return jax.lax.with_sharding_constraint(grad, NamedSharding(mesh, P()))

    _, found = program_of(gradient, mesh, x=((B, D), P("fsdp")), weight=((D, D), P()))
    assert sums(found) == {("all-reduce", "fsdp"): 2 * D * D * ITEM * 3 / 4}


def test_tensor_parallel_mlp_reduces_its_output_alone():
    """Column then row parallel: one all-reduce of [B / data, D] (arXiv:1909.08053)."""
    mesh = mesh_of(data=2, tensor=4)

    def mlp(x, up, down):
        y = jnp.tanh(x @ up) @ down
        return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P("data")))

    shapes = {"x": ((B, D), P("data")), "up": ((D, F), P(None, "tensor"))}
    _, found = program_of(mlp, mesh, **shapes, down=((F, D), P("tensor")))
    assert sums(found) == {("all-reduce", "tensor"): 2 * (B // 2) * D * ITEM * 3 / 4}


def test_expert_parallel_exchange_is_an_all_to_all():
    mesh = mesh_of(data=1, expert=4)

    def exchange(x):
        def local(x):
            return jax.lax.all_to_all(x, "expert", 0, 1, tiled=True)

        return jax.shard_map(local, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))(x)

    _, found = program_of(exchange, mesh, x=((B, D), P("expert")))
    assert sums(found) == {("all-to-all", "expert"): (B // 4) * D * ITEM * 3 / 4}


def test_ring_sends_its_shard_at_every_turn():
    mesh = mesh_of(data=1, sequence=4)

    def ring(x):
        def local(x):
            def turn(i, x):
                return jax.lax.ppermute(x, "sequence", [(j, (j + 1) % 4) for j in range(4)]) + 1

            return jax.lax.fori_loop(0, 3, turn, x)

        specs = {"in_specs": P("sequence"), "out_specs": P("sequence")}
        return jax.shard_map(local, mesh=mesh, **specs)(x)

    _, found = program_of(ring, mesh, x=((B, D), P("sequence")))
    assert sums(found) == {("collective-permute", "sequence"): 3 * (B // 4) * D * ITEM}


@pytest.mark.parametrize(
    "text, group",
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", (0, 4)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", tuple(range(8))),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_replica_groups_are_read_in_every_form(text, group):
    module = module_of(f"""HloModule m

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8] parameter(0)
  ROOT %y = f32[8] all-to-all(%x), channel_id=1, {text}, dimensions={{0}}
}}
""")
    assert traffic._first_group(module.entry.root.proto, 8) == group


def test_a_mesh_of_more_fields_than_are_known_is_refused():
    """Bytes that an older reader drops would be taken for devices in their usual order."""
    groups = protos.message("MeshAxesReplicaGroupListProto")()
    groups.mesh.axes.add(name="a", size=2)
    groups.axes.add(mesh_axis_index=0)
    assert traffic._mesh_group(groups) == (0, 1)
    groups.mesh.MergeFromString(b"\x78\x01")  # field 15
    with pytest.raises(AssertionError, match="MeshProto"):
        traffic._mesh_group(groups)


@pytest.mark.slow  # of importing TensorFlow alone
def test_fields_have_the_numbers_that_tensorflow_knows():
    hlo_pb2 = pytest.importorskip("tensorflow.compiler.xla.service.hlo_pb2")
    from tensorflow.compiler.xla import xla_data_pb2

    met = set()

    def compare(ours, known):
        if ours.name in met:
            return
        met.add(ours.name)
        for field in ours.fields:
            if (ours.name, field.name) == ("MeshProto", "iota"):  # newer than this TensorFlow
                continue
            other = known.fields_by_name[field.name]
            assert (field.number, field.is_repeated) == (other.number, other.is_repeated)
            assert (field.type == field.TYPE_BYTES) == (other.type == field.TYPE_BYTES)
            assert (field.type == field.TYPE_STRING) == (other.type == field.TYPE_STRING)
            if field.message_type:
                compare(field.message_type, other.message_type)

    compare(protos.message("HloProto").DESCRIPTOR, hlo_pb2.HloProto.DESCRIPTOR)
    assert met == set(protos._MESSAGES) - {"Iota"}
    for name, number in xla_data_pb2.PrimitiveType.items():
        assert name in (protos.DTYPES[number].upper(), "OPAQUE_TYPE", "PRIMITIVE_TYPE_INVALID")


@pytest.mark.parametrize(
    "group, axis",
    [
        ((0, 4), "data"),
        ((0, 1, 2, 3), "fsdp"),
        (tuple(range(8)), "data+fsdp"),
        ((0, 1), "part of fsdp"),
    ],
)
def test_groups_are_named_by_the_axes_that_they_span(group, axis):
    names, whole = traffic._axes(group, {"data": 2, "fsdp": 4})
    assert ("" if whole else "part of ") + "+".join(names) == axis


# A loop over six products, whose length no compiler has noted.
LOOP = """HloModule m

%condition (c: (s32[], f32[4,4])) -> pred[] {
  %c = (s32[], f32[4,4]{1,0}) parameter(0)
  %six = s32[] constant(6)
  %counter = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%counter, %six), direction=LT
}

%body (b: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %b = (s32[], f32[4,4]{1,0:T(8,128)}) parameter(0)
  %one = s32[] constant(1)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%b), index=1
  %next = s32[] add(%i, %one)
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %whole = f32[4,8]{1,0} all-gather(%x), replica_groups={{0,1}}, dimensions={1}
  ROOT %t = (s32[], f32[4,4]{1,0}) tuple(%next, %y)
}

ENTRY %main (x: f32[4,4]) -> f32[4,4] {
  %zero = s32[] constant(0)
  %input = f32[4,4]{1,0} parameter(0)
  %start = (s32[], f32[4,4]{1,0}) tuple(%zero, %input)
  %loop = (s32[], f32[4,4]{1,0}) while(%start), condition=%condition, body=%body
  %product = f32[4,4]{1,0} get-tuple-element(%loop), index=1
  ROOT %end = f32[4,4]{1,0} negate(%product)
}
"""


def test_a_loops_length_is_found_from_its_counter():
    module = module_of(LOOP)
    assert costs.count_flops_and_hbm_bytes(module).flops == 6 * 2 * 4**3
    [gather] = traffic.collectives(module, {"fsdp": 2})
    assert (gather.times, gather.bytes) == (6, 6 * 4 * 8 * 4 / 2)
    assert module.entry.root.operands[0].shapes[0].dims == (4, 4)


def test_a_loop_that_ends_on_data_is_named_and_counts_once():
    def f(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: jnp.tanh(x @ w), x)

    module, _ = program_of(f, mesh_of(data=1), x=((B, D), P()), w=((D, D), P()))
    found = costs.count_flops_and_hbm_bytes(module)
    assert found.flops == 2 * B * D * D and len(found.loops) == 1 and "while" in found.loops[0]
    times = roofline.times(topology.parse("v5e:2x2"), module, found, [], "bfloat16")
    assert f"length of 1 loops, which count once: {found.loops[0]}" in times.unknown


def test_parts_of_a_tuple_of_tuples_are_told_apart():
    shape = "((f32[2]{0}, s32[]), /*index=1*/bf16[4,8]{1,0:T(8,128)(2,1)S(1)})"
    module = module_of(f"HloModule m\n\nENTRY %main {{\n  ROOT %x = {shape} parameter(0)\n}}\n")
    root = module.entry.root
    leaves = (hlo.Shape("f32", (2,)), hlo.Shape("s32", ()), hlo.Shape("bf16", (4, 8), 1))
    assert root.shapes == leaves
    for index, part in (((0,), leaves[:2]), ((0, 1), leaves[1:2]), ((1,), leaves[2:])):
        assert hlo.shapes(hlo.shape_at(root.proto.shape, index)) == part


def test_a_gather_spread_over_products_counts_once():
    """libtpu writes it into the fusion that starts it, those that go on with it and the last."""

    def fused(name, target):
        call = f'custom-call(%{name}.g), custom_call_target="{target}"' if target else ""
        root = call or f"negate(%{name}.g)"
        return f"""
%{name} (p: f32[4,4]) -> f32[4,16] {{
  %{name}.p = f32[4,4]{{1,0}} parameter(0)
  %{name}.g = f32[4,16]{{1,0}} all-gather(%{name}.p), replica_groups={{{{0,1,2,3}}}}, \
dimensions={{1}}, frontend_attributes={{chain_id="1"}}
  ROOT %{name}.r = f32[4,16]{{1,0}} {root}
}}
"""

    text = (
        "HloModule m\n"
        + fused("first", "AsyncCollectiveStart")
        + fused("between", "")
        + fused("last", "AsyncCollectiveDone")
        + """
ENTRY %main (x: f32[4,4]) -> f32[4,16] {
  %x = f32[4,4]{1,0} parameter(0)
  %a = f32[4,16]{1,0} fusion(%x), kind=kCustom, calls=%first
  %b = f32[4,16]{1,0} fusion(%x), kind=kOutput, calls=%between
  ROOT %c = f32[4,16]{1,0} fusion(%x), kind=kCustom, calls=%last
}
"""
    )
    [found] = traffic.collectives(module_of(text), {"fsdp": 4})
    assert found.bytes == 4 * 16 * ITEM * 3 / 4


def test_what_slices_send_each_other_is_read_from_their_hosts_transfers():
    text = """HloModule m

ENTRY %main (x: f32[8]) -> (f32[8], u32[], token[]) {
  %x = f32[8]{0} parameter(0)
  %t = token[] after-all()
  ROOT %s = (f32[8]{0}, u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""
    [found] = traffic.collectives(module_of(text), {"data": 2, "fsdp": 4}, slices=2)
    assert (found.kind, found.axis, found.group) == ("all-reduce", "data", (0, 4))
    assert found.bytes == 2 * 8 * 4 / 2


# ---- work ----


@pytest.mark.parametrize("trips", [1, 7])
def test_products_in_a_loop_count_as_often_as_it_runs(trips):
    def f(x, w):
        return jax.lax.fori_loop(0, trips, lambda _, x: jnp.tanh(x @ w), x)

    module, _ = program_of(f, mesh_of(data=1), x=((B, D), P()), w=((D, D), P()))
    assert costs.count_flops_and_hbm_bytes(module).flops == trips * 2 * B * D * D


@pytest.mark.parametrize("tie, heads", [(True, 4), (False, 2)])
def test_model_flops_are_those_of_the_program_unrolled(make_experiment, tie, heads):
    """Within 2%: the program multiplies the whole square of scores, and nothing else is missing."""
    changes = {"model.scan_unroll": -1, "model.num_kv_heads": heads, "model.tie_embeddings": tie}
    experiment = make_experiment({**changes, "loss.chunk_size": 0})
    module = hlo.of_compiled(experiment.lower_train_step().compile())
    c = experiment.config
    formula = flops.flops_per_token(c.model, c.data.length, full_square=True)
    formula *= experiment.batch_size * c.data.length
    assert costs.count_flops_and_hbm_bytes(module).flops == pytest.approx(formula, rel=0.02)


@pytest.mark.parametrize(
    "changes", [{"model.lora.rank": 4}, {"optimizer.frozen": ("layers.mlp.*",)}]
)
def test_a_run_with_frozen_weights_has_the_flops_of_its_program(make_experiment, changes):
    """Products with their gradients are in neither."""
    experiment = make_experiment({**changes, "loss.chunk_size": 0, "model.tie_embeddings": False})
    c, frozen = experiment.config, experiment.initializer.frozen
    module = hlo.of_compiled(experiment.lower_train_step().compile())
    formula = flops.flops_per_token(c.model, c.data.length, full_square=True, frozen=frozen)
    formula *= experiment.batch_size * c.data.length
    assert costs.count_flops_and_hbm_bytes(module).flops == pytest.approx(formula, rel=0.02)
    whole = flops.flops_per_token(c.model, c.data.length, full_square=True)
    assert formula < 0.95 * whole * experiment.batch_size * c.data.length


def test_a_scanned_program_has_the_flops_of_the_unrolled_one(make_experiment):
    def count(unroll):
        experiment = make_experiment({"model.scan_unroll": unroll, "model.num_layers": 3})
        return costs.count_flops_and_hbm_bytes(
            hlo.of_compiled(experiment.lower_train_step().compile())
        ).flops

    assert count(1) == count(-1)


def test_a_window_that_meets_padding_counts_its_hits_alone():
    """A batched product as TPUs write it: size n over n dilated elements, one hit each."""
    assert costs._valid_window_positions(4, 4, 4, stride=3, low=0, spread=4, dilate=1) == 4
    assert costs._valid_window_positions(6, 3, 4, stride=1, low=0, spread=1, dilate=1) == 12
    assert (
        costs._valid_window_positions(4, 3, 4, stride=1, low=1, spread=1, dilate=1) == 10
    )  # same padding


def test_a_slice_copied_in_the_background_reads_no_more_than_itself():
    """libtpu brings slices of what lies in HBM to the chip while other work runs."""
    text = """HloModule m

%copied (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %s = f32[2,4]{1,0:S(1)} slice(%p), slice={[0:2], [0:4]}
}

ENTRY %main (x: f32[8,4]) -> f32[2,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %a = ((f32[8,4]{1,0}), f32[2,4]{1,0:S(1)}, s32[]{:S(2)}) async-start(%x), calls=%copied
  ROOT %b = f32[2,4]{1,0:S(1)} async-done(%a)
}
"""
    assert costs.count_flops_and_hbm_bytes(module_of(text)).hbm_bytes == 2 * 4 * ITEM


@pytest.mark.parametrize("batch", ["", "2,"])
def test_a_splash_kernel_counts_the_blocks_of_its_schedule(batch):
    """Also of a single row, of which the compiler leaves out the first dimension: 3 products of
    the 3 blocks that causality leaves of 2 x 2.
    """
    blocks = json.dumps({"block_q_dq": 512, "block_kv_dq": 512})
    noted = json.dumps(json.dumps({"xprof_metadata": blocks}))
    text = f"""HloModule m

ENTRY %main (t: s8[1,2,2], q: bf16[{batch}16,1024,128]) -> bf16[{batch}16,1024,128] {{
  %t = s8[1,2,2] parameter(0)
  %q = bf16[{batch}16,1024,128] parameter(1)
  %k = bf16[{batch}4,1024,128] parameter(2)
  ROOT %splash_mha_dq_segmented.1 = bf16[{batch}16,1024,128] custom-call(%t, %q, %k, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={noted}}}
}}
"""
    found = costs.count_flops_and_hbm_bytes(module_of(text))
    rows = 2 if batch else 1
    assert found.flops == 3 * 2 * rows * 16 * 128 * 3 * 512**2 and not found.unknown


# ---- memory ----


@pytest.fixture(scope="module")
def compiled(make_experiment):
    experiment = make_experiment({"model.remat": "none", "train.num_microbatches": 2}, fsdp=4)
    return experiment, compiling.compile_step(experiment.lower_train_step())


def test_groups_add_up_to_the_compilers_total(compiled):
    experiment, made = compiled
    found = plan.analyse(experiment, topology.parse("cpu:4"), made).memory
    assert found.stated is not None
    assert sum(found.groups.values()) == found.total
    assert found.total == pytest.approx(found.stated, rel=0.02)


def test_state_is_told_apart_exactly(compiled):
    """Parameters and optimizer state are the bytes of their shards."""
    experiment, made = compiled
    groups = plan.analyse(experiment, topology.parse("cpu:4"), made).memory.groups

    def size(tree):
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )

    assert groups["parameters"] == size(experiment.abstract_params)
    assert groups["optimizer"] == size(experiment.abstract_state.opt_state)


def test_an_average_of_the_weights_counts_once(make_experiment):
    def measured(ema_decay):
        experiment = make_experiment({"optimizer.ema_decay": ema_decay}, fsdp=4)
        made = compiling.compile_step(experiment.lower_train_step())
        memory = plan.analyse(experiment, topology.parse("cpu:4"), made).memory
        coords = [interconnect.ChipCoord(0, (0, i)) for i in range(4)]
        found = estimate.estimate(
            dataclasses.replace(
                experiment.config,
                model=dataclasses.replace(experiment.config.model, dtype="bfloat16"),
            ),
            experiment.batch_size,
            topology.parse("v5e:2x2"),
            experiment.rules,
            coords=coords,
        )
        return experiment, memory, found.memory

    experiment, without, without_by_formula = measured(0.0)
    _, averaged, averaged_by_formula = measured(0.99)
    size = shards.bytes_on_device(jax.tree.leaves(experiment.abstract_params))
    count = 4  # of averages so far
    assert averaged.groups["optimizer"] - without.groups["optimizer"] == size + count
    assert averaged.total - without.total == pytest.approx(size, rel=0.1)
    # the formula shards norms, too
    assert averaged_by_formula - without_by_formula == pytest.approx(size, rel=0.05)


def test_saving_less_shrinks_saved_activations_alone(make_experiment):
    def memory(remat):
        changes = {"model.remat": remat, "model.num_layers": 8, "data.batch_size": 32}
        experiment = make_experiment(changes)
        made = compiling.compile_step(experiment.lower_train_step())
        return plan.analyse(experiment, topology.parse("cpu:1"), made).memory

    none, full = memory("none"), memory("full")
    assert full.groups["saved activations"] < 0.5 * none.groups["saved activations"]
    for group in ("parameters", "optimizer"):
        assert full.groups[group] == none.groups[group]

    saved = {line.op.partition("/layers/")[2]: line for line in none.largest}
    assert saved["mlp/up/dot_general"].group == "saved activations"
    assert saved["mlp/up/dot_general"].source.startswith("lm/layers/linear.py:")
    assert sum("dynamic_update_slice" in line.op for line in none.largest) < 3


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_saved_activations_of_a_parameters_shape_are_no_gradients(
    make_experiment, num_microbatches
):
    """A row as long as the model is wide: what a layer saves has the shape of its matrices."""
    length = 64
    changes = {
        "model.remat": "none",
        "model.embed_dim": length,
        "model.max_length": length,
        "model.num_layers": 4,
        "data.length": length,
        "data.batch_size": num_microbatches,
        "train.num_microbatches": num_microbatches,
    }

    experiment = make_experiment(changes)
    made = compiling.compile_step(experiment.lower_train_step())
    memory = plan.analyse(experiment, topology.parse("cpu:1"), made).memory
    parameters = memory.groups["parameters"]
    mlp = 4 * length * experiment.config.model.mlp_size * 4  # one value of every layer, float32
    assert memory.groups["saved activations"] > 3 * mlp
    assert memory.groups["gradients"] < 1.5 * num_microbatches * parameters


def test_a_heaps_peak_counts_shared_bytes_once():
    def buffer(offset, size, start, stop):
        return buffers.Buffer((), hlo.Shape("f32", (size // 4,)), size, offset, start, stop)

    apart = (buffer(0, 8, 0, 5), buffer(8, 8, 3, 9), buffer(0, 4, 6, 9))
    assert buffers.peak(apart) == [(apart[0], 8), (apart[1], 8)]
    in_place = (buffer(0, 8, 0, 5), buffer(0, 8, 5, 9))
    assert sum(size for _, size in buffers.peak(in_place)) == 8


# ---- wires ----


def torus(name):
    target = topology.parse(name)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in target.shape), indexing="ij"), -1)
    return target, [
        interconnect.ChipCoord(0, tuple(c), 0) for c in grid.reshape(-1, len(target.shape))
    ]


@pytest.mark.parametrize(
    "name, members, links",
    [
        ("v5p:4x4x4", [0, 1, 2, 3], 2),  # a ring
        ("v5p:2x2x1", [0, 1], 1),  # a line
        ("v5p:4x4x4", list(range(16)), 4),  # two rings
        ("v5e:8x8", list(range(8)), 1),  # does not close below 16
        ("v5e:16x16", list(range(16)), 2),
        ("v5p:2x2x4", [0, 1, 2, 3], 1),  # no ring in less than a cube
        ("v5p:4x4x2", list(range(0, 32, 2)), 2),
        ("v5e:8x16", list(range(16)), 2),  # in two dimensions each closes by itself
        ("v5e:4x4", [0, 2], 0.5),  # every second chip shares its line with another group
        ("v5p:4x4x4", [0, 2], 1),  # and its ring
    ],
)
def test_a_group_has_the_links_that_its_shape_gives(name, members, links):
    target, places = torus(name)
    found = interconnect.path(target, [places[i] for i in members])
    assert found.bandwidth == links * target.chip.link


def fullest_link(target, members):
    """Load of the fullest link of a slice in one direction, where every member sends 1 to every
    member: bytes go along one dimension after another, the short way, half of them each way
    where both are as short.
    """
    load = collections.Counter()
    for a, b in itertools.permutations(members, 2):
        at = list(a.chip)
        for dimension, length in enumerate(target.shape):
            ahead = (b.chip[dimension] - at[dimension]) % length
            ways = [(1, ahead), (-1, length - ahead)]
            if not target.closes(dimension):
                ways = [w for w in ways if 0 <= at[dimension] + w[0] * w[1] < length]
            least = min(steps for _, steps in ways)
            ways = [w for w in ways if w[1] == least]
            for direction, steps in ways:
                for k in range(steps):
                    chip = list(at)
                    chip[dimension] = (at[dimension] + direction * k) % length
                    load[tuple(chip), dimension, direction] += 1 / len(ways)
            at[dimension] = b.chip[dimension]
    return max(load.values())


@pytest.mark.parametrize(
    "name, members",
    [
        ("v5p:4x4x4", range(64)),  # rings in three dimensions
        ("v5p:4x4x4", range(16)),
        ("v5p:4x4x8", range(128)),  # the longest decides
        ("v5p:2x2x4", range(16)),  # lines
        ("v5e:4x8", range(32)),
        ("v5e:3x5", range(15)),
        ("v5e:2x16", range(32)),  # a line and a ring
        ("v5e:8x8", range(8)),
    ],
)
def test_an_exchange_takes_as_long_as_its_fullest_link(name, members):
    target, places = torus(name)
    group = [places[i] for i in members]
    n, sent = len(group), 1e9  # bytes to each of the others
    exchange = traffic.Collective(
        "all-to-all", ("expert",), True, tuple(members), int(sent * n), 1, "", ""
    )
    expected = fullest_link(target, group) * sent / target.chip.link
    assert interconnect.transfer_seconds(
        exchange, interconnect.path(target, group)
    ) == pytest.approx(expected)


@pytest.mark.parametrize(
    "name, pairs, load",
    [
        ("v5p:4x4x4", [(i, (i + 1) % 4) for i in range(4)], 0.5),  # a ring, of whose links half
        ("v5e:4x4", [(i, (i + 1) % 4) for i in range(4)], 1),  # a line: the way back is full, too
        ("v5e:4x4", [(0, 3)], 0.5),
        # row by row: four ways back from the end of a row share the links of the row beside it
        ("v5e:2x4", [(i, (i + 1) % 8) for i in range(8)], 1),
        ("v5p:4x4x4", [(0, 2)], 0.25),  # as short either way
    ],
)
def test_a_permutation_takes_as_long_as_its_fullest_link(name, pairs, load):
    """Half of its load in both directions."""
    target, places = torus(name)
    size = 10**9
    permutation = traffic.Collective(
        "collective-permute", ("fsdp",), True, (0, 1), size, 3, "", "", pairs=tuple(pairs)
    )
    found = interconnect.permutation_seconds(permutation, target, places)
    assert found == pytest.approx(3 * load * size / target.chip.link)


def test_a_small_transfer_takes_a_microsecond_for_each_chip_that_it_passes():
    target, places = torus("v5e:16x16")
    small = traffic.Collective("all-reduce", ("fsdp",), True, tuple(range(16)), 4, 10, "", "")
    [priced] = interconnect.price([small], target, places)
    assert priced.seconds == pytest.approx(10 * 2 * 8e-6)  # to the far side of a ring and back


def test_cores_of_a_chip_share_its_links_in_an_exchange():
    """Both send different bytes, which gather and sum do not."""
    target, places = torus("tpu7x:4x4x4")
    both = [dataclasses.replace(p, core=core) for p in places for core in (0, 1)]
    one, two = interconnect.path(target, places), interconnect.path(target, both)
    assert two.bandwidth == 2 * one.bandwidth and two.exchange == pytest.approx(one.exchange)


def test_groups_of_two_slices_use_the_network():
    target = topology.parse("2xv5e:16x16")
    path = interconnect.path(
        target, [interconnect.ChipCoord(0, (0, 0), 0), interconnect.ChipCoord(1, (0, 0), 0)]
    )
    assert path.network and path.bandwidth == target.chip.network


# ---- names ----


@pytest.mark.parametrize(
    "name, shape, chips",
    [
        ("v5p:4x4x8", (4, 4, 8), 128),
        ("2xv5e:16x16", (16, 16), 512),
        ("h100:64", (8, 8), 64),
        ("h100:4", (1, 4), 4),
        ("b200:4x2", (4, 2), 8),
        ("cpu:8", (8,), 8),
    ],
)
def test_topologies_are_named_by_their_shape(name, shape, chips):
    found = topology.parse(name)
    assert (found.shape, found.num_chips) == (shape, chips)


@pytest.mark.parametrize("name", ["v5p", "v9:2x2", "v5p:4x4", "2xh100:8", "h100:12", "v5e:0x4", ""])
def test_a_wrong_topology_is_refused_with_its_name(name):
    with pytest.raises(ValueError, match=f"--topology={name}"):
        topology.parse(name)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"
)
def test_a_slice_that_does_not_exist_is_refused_with_those_near_it():
    with pytest.raises(ValueError) as error:
        topology.devices(topology.parse("v5e:3x3"))
    near = "v5e:2x2, v5e:2x4, v5e:4x4"
    assert str(error.value) == f"--topology=v5e:3x3: no slice has this shape; nearby are {near}"


@pytest.mark.parametrize("name, total", [("h100", 79.1), ("h200", 139.8), ("b200", 178.35)])
def test_a_gpu_has_three_quarters_of_its_memory_unless_jax_is_told(monkeypatch, name, total):
    """Totals that CUDA reports, in GiB; jax's share as its own variables say."""
    chip = chips.CHIPS[name]
    for variable in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(variable, raising=False)
    assert chip.hbm / 2**30 == pytest.approx(0.75 * total)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert chip.hbm / 2**30 == pytest.approx(0.9 * total)
    assert f"device_memory_size: {chip.memory}\n" in gpus.target_config(chip)


def test_a_plan_for_a_gpu_counts_what_jax_takes_of_it(small_plan, monkeypatch):
    """70 GiB do not fit an H100 whose jax takes 59.3, and the page says of which whole."""
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    made = small_plan[2]
    used = dataclasses.replace(made.memory, total=70 * 2**30)
    of_gpu = dataclasses.replace(
        made, topology="h100:8", memory=used, capacity=chips.CHIPS["h100"].hbm
    )
    assert not of_gpu.fits
    assert "59.32 GiB  75% of 79.10 GiB: XLA_CLIENT_MEM_FRACTION" in report.page(of_gpu)


@needs_tpu
@pytest.mark.parametrize("name", ["v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1"])
def test_a_chip_has_the_memory_that_its_compiler_leaves_to_a_program(name):
    """A program of 320 GiB, on a slice of one chip: its refusal names the limit. That of libtpu
    0.0.52 is 10 MiB below that of 0.0.42, which the table has.
    """
    target = topology.parse(name)
    devices = topology.devices(target)
    assert len(devices) == target.chip.devices
    alone = NamedSharding(Mesh(np.array(devices[:1]), ("data",)), P())
    large = jax.ShapeDtypeStruct((40 * 2**30,), jnp.float32, sharding=alone)
    made = compiling.compile_step(jax.jit(lambda x: x + 1, out_shardings=alone).lower(large))
    assert target.chip.hbm - 11 * 2**20 < made.available <= target.chip.hbm


# ---- plans ----


@pytest.fixture(scope="module")
def small_plan(make_config, tmp_path_factory):
    config = make_config({"mesh.data": 2, "mesh.fsdp": 4, "data.train": ("not/there",)})
    folder = tmp_path_factory.mktemp("plans")
    make = functools.partial(plan.make, folder=folder)
    return make, config, make(config, "cpu:8")


def test_a_plan_needs_no_data_and_goes_to_json_and_back(small_plan):
    made = small_plan[2]
    assert plan.from_json(made.to_json()) == made
    assert json.loads(made.to_json())["derived"]["fits"] is True


def test_a_plan_says_what_a_checkpoint_costs(small_plan):
    made = small_plan[2]
    moments_and_counts = made.save.total - 4 * made.parameters
    assert 0 <= moments_and_counts - 8 * made.parameters < 100
    assert made.save.num_hosts == 1 and made.save.written == made.save.read_back == made.save.total
    text = report.checkpoint(dataclasses.replace(made.save, written=5 * 10**9, num_hosts=1024), 2.5)
    assert "1,024 hosts" in text and "2.00 s" in text and "at 2.5 GB/s a host" in text


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"
)
def test_every_host_writes_an_equal_part_of_what_it_can(make_config):
    config = make_config({"mesh.data": 2, "mesh.fsdp": 8})
    devices = topology.devices(topology.parse("v5e:4x4"))
    state = Experiment(plan.without_data(config), devices).abstract_state
    cost = save_cost.measure(state)
    assert cost.num_hosts == 4
    assert cost.total / 4 <= cost.written < 1.05 * cost.total / 4
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        hosts = save_cost.bytes_by_host(leaf)
        assert sum(hosts.values()) == leaf.size * leaf.dtype.itemsize


def test_a_plan_of_pairs_of_texts_needs_no_data_either(make_config):
    config = make_config({"data.train": ("not/there",)})
    config.objective = conversion.default(objective="seq2seq").objective
    experiment = Experiment(plan.without_data(config), jax.devices()[:1])
    assert "dot_general" in experiment.lower_train_step().as_text()


def test_a_plan_is_found_again_until_the_config_changes(small_plan):
    make, config, made = small_plan
    assert make(config, "cpu:8") == made  # the time that compiling took, too
    changed = config.copy_and_resolve_references()
    changed.optimizer.learning_rate = 0.5
    assert plan.key(changed, "cpu:8") != plan.key(config, "cpu:8")


def test_the_page_names_every_group_and_axis(small_plan):
    made = small_plan[2]
    page = report.page(made)
    assert all(
        name in page for name, n in made.memory.groups.items() if n > made.memory.total / 100
    )
    assert "fsdp" in page and "data" in page


def test_parameters_that_an_axis_could_shard_are_pointed_out(make_experiment):
    experiment = make_experiment(fsdp=4, data=2)
    made = compiling.compile_step(experiment.lower_train_step())
    found = plan.analyse(experiment, topology.parse("cpu:8"), made)
    tiny = dataclasses.replace(found, capacity=found.memory.total)
    warned = plan.findings.warnings(tiny, experiment, topology.parse("cpu:8"), (), ())
    assert any(w.startswith("replicated over data=2") for w in warned)
    assert not any(w.startswith("replicated over fsdp") for w in warned)


def test_an_involuntary_rematerialization_is_told(small_plan, make_experiment):
    line = (
        "W0000 spmd_partitioner.cc:652] [SPMD] Involuntary full rematerialization. The compiler "
        "cannot go from one sharding to another for HLO operation %gather.1 = bf16[8,16]{1,0} "
        'gather(...), metadata={op_name="jit(f)/embedding/gather"}'
    )
    target = topology.parse("cpu:8")
    experiment = make_experiment(fsdp=4, data=2)
    found = plan.findings.warnings(small_plan[2], experiment, target, (), (line, "other"))
    assert "bf16[8,16] jit(f)/embedding/gather" in found[0]


def test_a_vocabulary_that_a_gpu_would_pad_is_pointed_out(small_plan, make_experiment):
    experiment = make_experiment(fsdp=4, data=2)
    size = experiment.config.model.vocab_size
    assert size % 8 == 0
    odd = dataclasses.replace(experiment.config.model, vocab_size=size - 3)
    experiment.config = dataclasses.replace(experiment.config, model=odd)
    for target, warns in (("h100:8", True), ("cpu:8", False)):
        found = plan.findings.warnings(small_plan[2], experiment, topology.parse(target), (), ())
        named = [line for line in found if line.startswith("config.model.vocab_size")]
        assert named == warns * [
            f"config.model.vocab_size ({size - 3}) is no multiple of 8: products read padded "
            f"copies; {size} needs none"
        ]


def analysed(experiment, made, **changes):
    return plan.analyse(experiment, topology.parse("cpu:4"), dataclasses.replace(made, **changes))


def test_a_program_whose_loops_are_not_found_is_no_plan(make_experiment):
    """The same program, but with loops that are written in a way which nobody reads."""
    changes = {"model.num_layers": 8, "data.batch_size": 8}
    experiment = make_experiment(changes, fsdp=4)
    made = compiling.compile_step(experiment.lower_train_step())
    assert analysed(experiment, made).work.flops > 0
    program = copy.deepcopy(made.program)
    for computation in program.hlo_module.computations:
        for instruction in computation.instructions:
            instruction.ClearField("backend_config")
            instruction.ClearField("comparison_direction")
    with pytest.raises(plausibility.ImplausiblePlan) as error:
        analysed(experiment, made, program=program)
    message = str(error.value)
    assert re.search(r"its products are \S+ FLOP a device, [1-5]\d\.\d% of the model's", message)
    for library in ("jax", "jaxlib"):
        assert f"{library} {importlib.metadata.version(library)}" in message
    assert "\n" not in message and "cpu:4" in message


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: {"collectives": []}, "0 collectives cross fsdp (4) in 2 layers, with 0 bytes"),
        (
            lambda p: {"memory": dataclasses.replace(p.memory, total=p.memory.stated + 2**30)},
            "its buffers add up to",
        ),
        (
            lambda p: {"memory": dataclasses.replace(p.memory, groups={"batch": 1})},
            "parameters take 0 bytes, their shards",
        ),
        (
            lambda p: {
                "peak_flops": 1.0,
                "times": StepTimeBounds(0.0, 1e-3, {}, None, {}, 1e-3, 1e-3, ()),
            },
            "MFU would be up to ",
        ),
        (
            lambda p: {"work": dataclasses.replace(p.work, flops=0.5 * p.model_flops)},
            "50.0% of the model's",
        ),
    ],
)
def test_figures_that_cannot_be_right_are_named(compiled, change, message):
    experiment, made = compiled
    target = topology.parse("cpu:4")
    whole = plan.analyse(experiment, target, made)
    mesh = experiment.rules.mesh
    found = traffic.collectives(hlo.read(made.program.hlo_module), mesh.shape)
    plausibility.check(whole, experiment, found)
    changes = change(whole)
    found = changes.pop("collectives", found)
    with pytest.raises(plausibility.ImplausiblePlan, match=re.escape(message)):
        plausibility.check(dataclasses.replace(whole, **changes), experiment, found)


@needs_tpu
def test_a_tpu_step_is_planned_with_its_groups_and_times(make_config):
    changes = {
        "model.dtype": "bfloat16",
        "model.embed_dim": 128,
        "model.head_dim": 128,
        "model.vocab_size": 2**20,  # little else would leave the chip's own memory
        "mesh.data": 1,
        "mesh.fsdp": 4,
    }
    made = plan.make(make_config(changes), "v5e:2x2")
    assert made.fits and made.memory.stated is not None
    assert sum(made.memory.groups.values()) == made.memory.total
    assert made.memory.total == pytest.approx(made.memory.stated, rel=0.02)
    assert made.memory.groups["parameters"] * 2 <= made.memory.groups["optimizer"]
    assert 0 < made.times.lower_bound_s < made.times.upper_bound_s
    # by the schedule: not above 20% on either side of the middle
    assert made.times.upper_bound_s < 1.2 * made.times.midpoint_s
    parts = made.times.parts()
    assert max(parts.values()) <= made.times.lower_bound_s < sum(parts.values())
    assert 0 < sum(made.times.exposed.values()) < made.times.lower_bound_s
    axes = {t.axis for t in made.transfers}
    assert axes == {"fsdp"}


@needs_tpu
def test_a_step_that_does_not_fit_says_by_how_much_and_why(make_config):
    changes = {"model.embed_dim": 8192, "model.mlp_dim": 65536, "mesh.data": 4}
    made = plan.make(make_config(changes), "v5e:2x2")
    assert not made.fits and made.refusal
    assert made.headroom is not None and made.headroom < 0
    assert made.memory.largest[0].group in ("parameters", "optimizer", "gradients")
    page = report.page(made)
    assert "DOES NOT FIT" in page and page.endswith(f"{report.SEARCH}\n")


@needs_tpu
def test_scores_of_one_query_that_are_no_products_are_not_missed(make_config):
    made = plan.make(
        make_config({"mesh.data": 4, "model.max_length": 512}),
        "v5e:2x2",
        decode=plan.Decode(8, 512),
    )
    assert made.work.flops < 0.9 * made.model_flops  # the compiler multiplies and adds them


def test_decode_is_planned_with_its_cache(make_config):
    made = plan.make(make_config({"mesh.data": 4}), "cpu:4", decode=plan.Decode(8, 32))
    c = made.memory.groups
    model = Experiment(make_config(), jax.devices()[:1]).model
    layers = jax.eval_shape(lambda: model.init_cache(2, 32))["layers"]
    assert c["cache"] >= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layers))
    assert memory.GROUPS.keys() >= c.keys()
