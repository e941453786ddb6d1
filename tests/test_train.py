"""The loop's work besides stepping."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from lm.telemetry import hlo_text
from lm.telemetry.hlo_text import Origin
from lm.telemetry.profiler import Operation, Profiler, summarize
from lm.training.loop import train


def names_in_trace(folder):
    [trace] = folder.glob("profile/plugins/profile/*/*.xplane.pb")
    return {f"work{i}" for i in range(10) if f"work{i}".encode() in trace.read_bytes()}


@pytest.mark.parametrize("start, expected", [(0, {"work2", "work3"}), (3, {"work3"})])
def test_the_profiler_sees_the_steps_of_its_window_alone(tmp_path, start, expected):
    with Profiler(str(tmp_path), range(2, 4)) as profiler:
        for step in range(start, 6):
            if profiler.is_over(step):
                profiler.stop()
            profiler.step(step)
            with jax.profiler.TraceAnnotation(f"work{step}"):
                pass
    assert names_in_trace(tmp_path) == expected
    [folder] = tmp_path.glob("profile/plugins/profile/*")
    assert folder.name == f"steps-{max(start, 2)}-3"


def test_a_window_that_a_run_ends_in_is_written_and_summarized(tmp_path):
    shown, add = [], jax.jit(lambda x: (x @ x).sum())
    add(jnp.ones((256, 256))).block_until_ready()
    with (
        pytest.raises(RuntimeError, match="the device failed"),
        Profiler(str(tmp_path), range(1, 100), shown.append) as profiler,
    ):
        for step in range(3):
            profiler.step(step)
            with jax.profiler.TraceAnnotation(f"work{step}"):
                add(jnp.ones((256, 256))).block_until_ready()
        raise RuntimeError("the device failed")
    assert names_in_trace(tmp_path) == {"work1", "work2"}
    [text] = shown
    assert "profile of steps 1-2: " in text and ", idle " in text
    assert re.search(r"%  compute +- +\S*(dot|fusion|reduce)\S* × 2\n", text + "\n")
    stored = json.loads((tmp_path / "profile/steps-1-2.json").read_text())
    assert stored["steps"] == "1-2" and sum(stored["shares"].values()) == pytest.approx(1)
    assert stored["operations"][0]["runs"] == 2


def test_a_summary_counts_nested_operations_once_and_idle_devices():
    ops = [
        Operation("while", "a", "a0", 0, 60),
        Operation("dot", "a", "a0", 10, 30),
        Operation("dot", "a", "a0", 30, 50),
        Operation("copy", "a", "a1", 50, 70),  # beside the loop for 10
        Operation("dot", "b", "b0", 90, 100),
    ]
    summary = summarize(ops)
    assert summary.seconds == pytest.approx(100e-9)
    assert summary.idle == pytest.approx(1 - (0.7 + 0.1) / 2)
    first, *rest = summary.longest
    assert (first.name, first.share, first.runs) == ("dot", pytest.approx(50 / 90), 3)
    assert {row.name for row in rest} == {"while", "copy"}
    assert all(row.share == pytest.approx(20 / 90) for row in rest)
    assert summarize([]) is None


def test_communication_counts_where_nothing_is_computed_beside_it_and_host_where_neither_is():
    ops = [
        Operation("fusion.1", "a", "a0", 0, 40),
        Operation("all-reduce.2", "a", "a1", 30, 60),  # beside the fusion for 10
        Operation("MemcpyD2H", "a", "a2", 50, 70),  # beside the all-reduce for 10
        Operation("fusion.1", "b", "b0", 0, 100),
    ]
    shares = summarize(ops).shares
    found = {kind: round(200 * share) for kind, share in shares.items()}
    assert found == {"compute": 140, "communication": 20, "host": 10, "idle": 30}


def _callback(x):
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def test_operations_of_a_program_have_their_kinds_and_the_lines_that_they_come_from(devices):
    mesh = jax.sharding.Mesh(devices, "data")

    def step(x):
        y = jnp.tanh(x @ x.T)  # a product of rows on different devices
        return _callback(y.sum())

    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(jnp.ones((64, 64)), sharding)
    compiled = jax.jit(step).lower(x).compile()
    program = hlo_text.parse(compiled.as_text())
    assert program.name == "jit_step"
    kinds = {origin.kind for origin in program.origins.values()}
    assert kinds == {"compute", "communication", "host"}
    lines = pathlib.Path(__file__).read_text().splitlines()
    number = 1 + next(i for i, line in enumerate(lines) if "a product of rows" in line)
    found = {o.source for n, o in program.origins.items() if "dot" in n or "tanh" in n}
    assert found == {f"{__file__}:{number}"}

    ops = [Operation(n, "a", "a0", 0, 1, "jit_other") for n in program.origins if "dot" in n]
    assert {row.source for row in summarize(ops, program).longest} == {""}  # another program's


HLO = """HloModule jit_step, is_scheduled=true

FileNames
1 "/x/site-packages/flax/linen/linear.py"
2 "/code/mine/bigram.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=4 end_line=4 column=2 end_column=12}
2 {file_name_id=2 function_name_id=2 line=20 end_line=20 column=2 end_column=3}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=1}


%fused (p: f32[4]) -> bf16[4] {
  %p = f32[4]{0} parameter(0)
  %exp.1 = f32[4]{0} exponential(%p), metadata={op_name="exp" stack_frame_id=2}
  ROOT %convert.1 = bf16[4]{0} convert(%exp.1)
}

%gather (q: bf16[4]) -> bf16[8] {
  %q = bf16[4]{0} parameter(0)
  ROOT %all-gather.1 = bf16[8]{0} all-gather(%q), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (x: f32[4]) -> bf16[8] {
  %x = f32[4]{0:T(128)} parameter(0)
  %fusion.1 = bf16[4]{0:T(128)(2,1)} fusion(%x), kind=kLoop, calls=%fused
  %async-start = ((bf16[4]{0}), bf16[8]{0}, u32[]) async-start(%fusion.1), calls=%gather
  %copy-start.1 = (f32[4]{0:S(5)}, f32[4]{0}, u32[]) copy-start(%x)
  %copy-start.2 = (f32[4]{0:S(1)}, f32[4]{0}, u32[]) copy-start(%x)
  ROOT %async-done = bf16[8]{0} async-done(%async-start), calls=%gather
}
"""


def test_a_fusion_is_from_the_line_of_what_it_fuses_and_an_async_operation_of_its_kind():
    found = hlo_text.parse(HLO).origins
    assert found["fusion.1"] == Origin("compute", "/code/mine/bigram.py:20")
    assert found["async-start"].kind == found["async-done"].kind == "communication"
    assert found["copy-start.1"].kind == "host" and found["copy-start.2"].kind == "compute"


def test_rows_of_the_table_are_source_lines():
    origins = {n: Origin("compute", "lm/layers/mlp.py:40") for n in ("fusion.1", "fusion.2")}
    program = hlo_text.Program("jit_step", origins)
    times = [("fusion.1", 0, 10), ("fusion.2", 10, 40), ("copy", 40, 50), ("fusion.1", 50, 60)]
    ops = [Operation(name, "a", "a0", *when, "jit_step") for name, *when in times]
    first, second = summarize(ops, program).longest
    assert (first.source, first.name, first.others) == ("lm/layers/mlp.py:40", "fusion.2", 1)
    assert (first.runs, round(first.share, 3)) == (3, round(50 / 60, 3))
    assert (second.source, second.name) == ("", "copy")
    assert "lm/layers/mlp.py:40  fusion.2 and 1 more × 3" in str(summarize(ops, program))


def test_a_schedule_longer_than_the_run_is_refused_before_anything_is_compiled(make_experiment):
    changes = {"optimizer.schedule.warmup_steps": 20, "train.num_steps": 10}
    with pytest.raises(ValueError, match=r"warmup_steps \(20\) .* need 20 steps; the run has 10"):
        make_experiment(changes).num_steps  # noqa: B018
    changes = {"optimizer.schedule.kind": "range", "optimizer.schedule.final_fraction": 0.0}
    with pytest.raises(ValueError, match=r"final_fraction \(0\.0\) must be above 0 and below 1"):
        make_experiment(changes).num_steps  # noqa: B018


def test_a_run_whose_objective_was_given_by_name_alone_goes_on(make_config, tmp_path, capsys):
    config = make_config({"train.num_steps": 2, "guard.self_check": False})
    config.objective = {"name": "prefix"}  # and no field of it
    for _ in range(2):
        assert train(config, str(tmp_path), jax.devices()[:1]) == 0
    assert "finished, all 2 steps are done" in capsys.readouterr().out
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["objective"] == {"name": "prefix", "bidirectional": True}

    config.objective.name = "causal"
    with pytest.raises(ValueError, match=r"config\.objective\.name: 'prefix' -> 'causal'"):
        train(config, str(tmp_path), jax.devices()[:1])


def test_a_run_of_an_older_version_without_a_components_fields_goes_on(make_config, tmp_path):
    config = make_config({"train.num_steps": 2, "guard.self_check": False})
    config.objective = {"name": "prefix"}
    assert train(config, str(tmp_path), jax.devices()[:1]) == 0
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["objective"]["bidirectional"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert train(config, str(tmp_path), jax.devices()[:1]) == 0
