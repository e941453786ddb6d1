"""An optimizer state in host memory is one for every function of a run, with the same numbers."""

import jax
import numpy as np
import pytest
from test_policies import Injector, spoil_row

from lm.checkpoint.manager import Checkpoints
from lm.exit_codes import Exit
from lm.generation.generator import Generator
from lm.telemetry import metrics
from lm.training import loop as training
from lm.training.evaluation import evaluate
from lm.training.restore import eval_params, restore, restore_params
from lm.training.stored_run import load

CHANGES = {
    "data.validation": ("synthetic:markov:16:7",),
    "optimizer.ema_decay": 0.9,
    "optimizer.schedule.kind": "constant",
    "checkpoint.every": 3,
    "train.eval_every": 5,
    "train.log_every": 1,
    "guard.policy": "rewind",
    "guard.agreement_every": 2,
    "guard.self_check": False,
}


@pytest.fixture(scope="module", params=[{"data": 1}, {"data": 2, "fsdp": 4}], ids=["1", "8"])
def runs(request, make_config, devices, tmp_path_factory):
    """{memory: folder} of two runs of 10 steps, and the devices; on one, step 7 is bad.

    The run in host memory stops after 5 steps and is resumed.
    """
    axes, folders = request.param, {}
    size = int(np.prod(list(axes.values())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Experiment", Injector)
        patch.setattr(
            Injector, "spoil", staticmethod(spoil_row(np.nan) if size == 1 else Injector.spoil)
        )
        for memory in ("device", "host"):
            folders[memory] = str(tmp_path_factory.mktemp(memory))
            for steps in (5, 10) if memory == "host" else (10,):
                config = make_config(
                    {**CHANGES, "optimizer.memory": memory, "train.num_steps": steps}
                )
                config.mesh.update(axes)
                assert training.train(config, folders[memory], devices[:size]) == Exit.SUCCESS
    return folders, devices[:size]


def restored(folder, devices):
    experiment = load(folder, devices, {"mesh.fsdp": len(devices)})
    with Checkpoints(folder, experiment.config.checkpoint, read_only=True) as checkpoints:
        state, _ = restore(experiment, checkpoints)
    return experiment, state, restore_params(experiment, folder)[1]


def test_training_resuming_and_rewinding_give_the_same_bits(runs):
    folders, devices = runs
    states = {memory: restored(folder, devices)[1] for memory, folder in folders.items()}
    kinds = {
        memory: {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.size > 1}
        for memory, state in states.items()
    }
    assert kinds == {"device": {"device"}, "host": {"pinned_host"}}
    a, b = (jax.device_get(states[memory]) for memory in ("device", "host"))
    assert int(a.step) == 10
    jax.tree.map(np.testing.assert_array_equal, a, b)
    found = [
        [(r["step"], r["kind"], r.get("loss")) for r in metrics.read(folders[memory])]
        for memory in ("device", "host")
    ]
    assert found[0] == found[1] and found[0][-1][1] == "eval"


def test_averaged_parameters_evaluate_and_generate(runs):
    folders, devices = runs
    experiment, state, params = restored(folders["host"], devices)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(params)} == {"device"}
    jax.tree.map(np.testing.assert_array_equal, params, eval_params(experiment, state))
    [again] = evaluate(experiment, params).values()
    last = metrics.read(folders["host"])[-1]
    assert again["loss"] == pytest.approx(last["loss"], rel=1e-6)
    generator = Generator(experiment.model, params, experiment.tokenizer)
    [text] = generator.generate(["a"], max_new_tokens=4)
    others = restored(folders["device"], devices)
    generator = Generator(others[0].model, others[2], others[0].tokenizer)
    assert generator.generate(["a"], max_new_tokens=4)[0].text == text.text
