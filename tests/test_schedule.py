"""Time of a step by its schedule, against small programs worked out by hand."""

import pytest

from lm.compiled import costs, hlo, interconnect, protos, roofline, topology, traffic

try:  # XLA's parser of HLO texts
    from jaxlib import _hlo as xla
except ImportError:  # jaxlib 0.10.0
    from jaxlib import _jax as xla

TARGET = topology.parse("v5e:2x2")  # two lines of two chips in each direction
PEAK, HBM, LINK = 197e12, 819e9, 50e9
N = 2048
PRODUCT = 2 * N**3 / PEAK  # 87 µs
GATHER = N * N * 2 / LINK  # of bf16[N, N] from a neighbour: 168 µs
CHIP, FAR = "{1,0:S(1)}", "{1,0}"  # layouts in the chip's memory and in HBM
PAIR = f"(bf16[{N},{N}]{CHIP}, bf16[{2 * N},{N}]{CHIP})"
COPY = N * N * 2 / HBM  # between HBM and the chip, one way: 10 µs


def bounds(body, computations="", target=TARGET):
    """StepTimeBounds of a program over x, in the chip's memory, and y, in HBM."""
    text = f"""HloModule m, is_scheduled=true
{computations}
ENTRY %main (x: bf16[{N},{N}], y: bf16[{N},{N}]) -> bf16[{N},{N}] {{
  %x = bf16[{N},{N}]{CHIP} parameter(0)
  %y = bf16[{N},{N}]{FAR} parameter(1)
{body}
}}
"""
    serialized = xla.hlo_module_from_text(text).as_serialized_hlo_module_proto()
    module = hlo.read(protos.message("HloModuleProto").FromString(serialized))
    mesh = {"data": 2, "fsdp": 2 * target.slices}
    coords = [
        interconnect.ChipCoord(slice_number, (i // 2, i % 2))
        for slice_number in range(target.slices)
        for i in range(4)
    ]
    found = traffic.collectives(module, mesh, slices=target.slices)
    priced = interconnect.price(found, target, coords)
    work = costs.count_flops_and_hbm_bytes(module)
    return roofline.times(target, module, work, priced, "bfloat16")


def dot(name, operand="x", layout=CHIP, root=""):
    dims = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    return f"  {root}%{name} = bf16[{N},{N}]{layout} dot(%{operand}, %{operand}), {dims}\n"


def start(name, groups="{{0,1},{2,3}}"):
    return f"  %{name} = {PAIR} all-gather-start(%x), replica_groups={groups}, dimensions={{0}}\n"


def done(name, of):
    return f"  %{name} = bf16[{2 * N},{N}]{CHIP} all-gather-done(%{of})\n"


END = f"  ROOT %end = bf16[{N},{N}]{CHIP} bitcast(%x)\n"


@pytest.mark.parametrize(
    "body, seconds, exposed",
    [
        (start("s") + done("d", "s") + dot("p"), PRODUCT + GATHER, GATHER),
        (start("s") + dot("p") + done("d", "s"), GATHER, GATHER - PRODUCT),
        (start("s") + dot("p") + dot("q") + dot("r") + done("d", "s"), 3 * PRODUCT, 0),
        (dot("p") + start("s") + done("d", "s"), PRODUCT + GATHER, GATHER),
    ],
    ids=["adjacent", "behind one product", "hidden", "too late"],
)
def test_a_transfer_is_exposed_for_what_no_operation_between_its_ends_hides(body, seconds, exposed):
    found = bounds(body + END)
    assert found.lower_bound_s == found.upper_bound_s == pytest.approx(seconds)
    assert found.exposed.get("links, fsdp", 0.0) == pytest.approx(exposed)
    assert found.midpoint_s == pytest.approx(seconds)


SUM = """
%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %c = bf16[] add(%a, %b)
}
"""


@pytest.mark.parametrize(
    "operation",
    [
        f"bf16[{2 * N},{N}]{CHIP} all-gather(%x), replica_groups={{{{0,1}}}}, dimensions={{0}}",
        f"bf16[{N},{N}]{CHIP} all-reduce(%x), replica_groups={{{{0,1}}}}, to_apply=%add",
    ],
)
def test_a_collective_without_a_start_is_exposed(operation):
    """Both send as much: a gather of two shards, and the sum of two, there and back."""
    found = bounds(f"  %g = {operation}\n" + dot("p") + END, SUM)
    assert found.lower_bound_s == pytest.approx(PRODUCT + GATHER)
    assert found.exposed == {"links, fsdp": pytest.approx(GATHER)}


def test_transfers_over_one_axis_wait_for_each_other_and_over_two_do_not():
    def two(groups):
        body = start("a") + start("b", groups) + dot("p") + done("c", "a") + done("d", "b") + END
        return bounds(body).lower_bound_s

    assert two("{{0,1},{2,3}}") == pytest.approx(2 * GATHER)
    assert two("{{0,2},{1,3}}") == pytest.approx(GATHER)


def test_bounds_differ_by_what_an_operation_reads_while_it_multiplies():
    found = bounds(dot("p", "y", FAR) + END)
    moved = 3 * COPY  # both operands and the result
    assert found.lower_bound_s == pytest.approx(max(PRODUCT, moved))
    assert found.upper_bound_s == pytest.approx(PRODUCT + moved)


@pytest.mark.parametrize("between, exposed", [("", COPY), (dot("p"), 0.0)])
def test_a_copy_to_the_chip_runs_behind_products(between, exposed):
    shapes = f"(bf16[{N},{N}]{CHIP}, bf16[{N},{N}]{FAR}, u32[])"
    copy = f"  %c = {shapes} copy-start(%y)\n{between}"
    copy += f"  %d = bf16[{N},{N}]{CHIP} copy-done(%c)\n"
    found = bounds(copy + END)
    assert found.exposed.get("HBM", 0.0) == pytest.approx(exposed)
    assert found.lower_bound_s == pytest.approx(exposed + (PRODUCT if between else 0))


def test_a_copy_shares_hbm_with_the_operations_that_it_runs_behind():
    """An operation that moves bytes all the time leaves the copy none of it."""
    shapes = f"(bf16[{N},{N}]{CHIP}, bf16[{N},{N}]{FAR}, u32[])"
    body = f"  %c = {shapes} copy-start(%y)\n  %n = bf16[{N},{N}]{FAR} negate(%y)\n"
    body += f"  %d = bf16[{N},{N}]{CHIP} copy-done(%c)\n"
    assert bounds(body + END).lower_bound_s == pytest.approx(3 * COPY)


@pytest.mark.parametrize("trips", [1, 2, 7])
def test_a_loop_takes_as_long_as_its_iterations_one_after_the_other(trips):
    """Each gathers behind a product; a gather that started before the loop is through by then."""
    state = f"(s32[], bf16[{N},{N}]{CHIP})"
    inner = start("s").replace("%x", "%v") + dot("p", "v") + done("d", "s")
    computations = f"""
%condition (c: (s32[], bf16[{N},{N}])) -> pred[] {{
  %c = {state} parameter(0)
  %limit = s32[] constant({trips})
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}}

%body (b: (s32[], bf16[{N},{N}])) -> (s32[], bf16[{N},{N}]) {{
  %b = {state} parameter(0)
  %one = s32[] constant(1)
  %j = s32[] get-tuple-element(%b), index=0
  %v = bf16[{N},{N}]{CHIP} get-tuple-element(%b), index=1
  %k = s32[]{{:S(1)}} add(%j, %one)
{inner}
  ROOT %t = (s32[]{{:S(1)}}, bf16[{N},{N}]{CHIP}) tuple(%k, %p)
}}
"""
    body = f"""
  %zero = s32[] constant(0)
{start("before", "{{0,2},{1,3}}")}
  %initial = {state} tuple(%zero, %x)
  %loop = {state} while(%initial), condition=%condition, body=%body
{done("after", "before")}
"""
    found = bounds(body + END, computations)
    assert found.lower_bound_s == pytest.approx(trips * GATHER, rel=1e-3)
    assert found.exposed["links, fsdp"] == pytest.approx(trips * (GATHER - PRODUCT), rel=1e-3)


def test_a_chain_of_fusions_hides_the_collective_that_they_share():
    """libtpu's: the first starts a gather, the last waits for it, those between multiply."""

    def fused(name, target):
        call = f'custom-call(%{name}.g), custom_call_target="{target}"'
        return f"""
%{name} (p: bf16[{N},{N}]) -> bf16[{2 * N},{N}] {{
  %{name}.p = bf16[{N},{N}]{CHIP} parameter(0)
  %{name}.g = bf16[{2 * N},{N}]{CHIP} all-gather(%{name}.p), \
replica_groups={{{{0,1}},{{2,3}}}}, dimensions={{0}}, frontend_attributes={{chain_id="7"}}
  ROOT %{name}.r = bf16[{2 * N},{N}]{CHIP} {call}
}}
"""

    def run(name):
        return f"  %{name}.out = bf16[{2 * N},{N}]{CHIP} fusion(%x), kind=kCustom, calls=%{name}\n"

    computations = fused("first", "AsyncCollectiveStart") + fused("last", "AsyncCollectiveDone")
    found = bounds(run("first") + dot("p") + run("last") + END, computations)
    assert found.lower_bound_s == pytest.approx(GATHER)
    assert found.exposed == {"links, fsdp": pytest.approx(GATHER - PRODUCT)}


def test_a_collective_in_an_async_computation_runs_behind_operations():
    """As XLA writes a reduce-scatter for GPUs."""
    half = f"bf16[{N // 2},{N}]{CHIP}"
    computations = f"""{SUM}
%wrapped (a: bf16[{N},{N}]) -> bf16[{N // 2},{N}] {{
  %a.1 = bf16[{N},{N}]{CHIP} parameter(0)
  ROOT %scattered = {half} reduce-scatter(%a.1), replica_groups={{{{0,1}},{{2,3}}}}, \
dimensions={{0}}, to_apply=%add
}}
"""
    started = f"  %s = ((bf16[{N},{N}]{CHIP}), {half}) async-start(%x), calls=%wrapped\n"
    body = started + dot("p") + f"  %d = {half} async-done(%s)\n"
    found = bounds(body + END, computations)
    assert found.lower_bound_s == pytest.approx(max(PRODUCT, GATHER / 2))
    assert bounds(
        started + f"  %d = {half} async-done(%s)\n" + dot("p") + END, computations
    ).exposed == {"links, fsdp": pytest.approx(GATHER / 2)}


def test_a_sum_between_slices_runs_from_its_send_until_its_recv_is_done():
    """As hosts do it for libtpu: what they send and receive has one rendezvous."""
    target = topology.parse("2xv5e:2x2")
    noted = '_xla_host_transfer_rendezvous="r",_xla_megascale_transfer_type="ALL_REDUCE"'
    ends = f"is_host_transfer=true, frontend_attributes={{{noted}}}"
    result = f"(bf16[{N},{N}]{CHIP}, u32[], token[])"
    started = f"""
  %t = token[] after-all()
  %s = {result} send(%x, %t), channel_id=1, {ends}
  %r = {result} recv(%t), channel_id=1, {ends}
"""
    finished = f"""
  %u = token[] send-done(%s), channel_id=1, is_host_transfer=true
  %v = (bf16[{N},{N}]{CHIP}, token[]) recv-done(%r), channel_id=1, is_host_transfer=true
"""
    found = bounds(started + dot("p") + finished + END, target=target)
    sent = N * N * 2 / 3.125e9  # by each chip, through its part of the network
    assert found.network == found.lower_bound_s == pytest.approx(sent)
    assert found.exposed == {"network": pytest.approx(sent - PRODUCT)}


def test_branches_that_data_choose_count_in_equal_parts():
    computations = f"""
%short (a: bf16[{N},{N}]) -> bf16[{N},{N}] {{
  ROOT %a = bf16[{N},{N}]{CHIP} parameter(0)
}}

%long (b: bf16[{N},{N}]) -> bf16[{N},{N}] {{
  %b = bf16[{N},{N}]{CHIP} parameter(0)
{dot("p", "b")}{dot("q", "p", root="ROOT ")}
}}
"""
    body = f"""
  %which = pred[] constant(true)
  %c = bf16[{N},{N}]{CHIP} conditional(%which, %x, %x), true_computation=%long, \
false_computation=%short
"""
    assert bounds(body + END, computations).lower_bound_s == pytest.approx(PRODUCT)


@pytest.mark.parametrize(
    "name, kind, speedup",
    [
        ("v5e:2x2", "s8", 2),
        ("v5e:2x2", "f8e4m3fn", 1),
        ("tpu7x:2x2x1", "f8e4m3fn", 2),
        ("h100:1", "f8e5m2", 2),
        ("h100:1", "bf16", 1),
    ],
)
def test_products_of_8_bits_take_half_the_time_where_the_chip_has_them(name, kind, speedup):
    chip = topology.parse(name).chip
    result = "s32" if kind == "s8" else "bf16"
    body = f"""  %a = {kind}[{N},{N}]{CHIP} convert(%x)
  %p = {result}[{N},{N}]{CHIP} dot(%a, %a), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
"""
    text = f"""HloModule m, is_scheduled=true
ENTRY %main (x: bf16[{N},{N}]) -> {result}[{N},{N}] {{
  %x = bf16[{N},{N}]{CHIP} parameter(0)
{body.replace("%p", "ROOT %p")}
}}
"""
    serialized = xla.hlo_module_from_text(text).as_serialized_hlo_module_proto()
    module = hlo.read(protos.message("HloModuleProto").FromString(serialized))
    work = costs.count_flops_and_hbm_bytes(module)
    found = roofline.times(topology.parse(name), module, work, (), "bfloat16")
    peak = chip.peak_flops("bfloat16")
    assert found.compute == pytest.approx(2 * N**3 / peak / speedup)
    assert found.lower_bound_s == pytest.approx(found.compute)
    assert sum(work.narrow_flops.values()) == (2 * N**3 if kind != "bf16" else 0)


def test_small_integers_of_a_kernel_are_no_products_of_8_bits():
    text = """HloModule m, is_scheduled=true
ENTRY %main (x: s8[8,8]) -> f32[8,8] {
  %x = s8[8,8]{1,0} parameter(0)
  ROOT %k = f32[8,8]{1,0} custom-call(%x, %x), custom_call_target="tpu_custom_call"
}
"""
    serialized = xla.hlo_module_from_text(text).as_serialized_hlo_module_proto()
    module = hlo.read(protos.message("HloModuleProto").FromString(serialized))
    assert [costs.narrow_type(i) for i in module.entry.instructions] == ["", ""]
