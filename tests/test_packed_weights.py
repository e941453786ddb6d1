"""Exports in 8 and 4 bits, read by transformers."""

import json
import sys

import numpy as np
import pytest
from safetensors import safe_open

from lm.compression.quantized_weights import WeightFormat, quantize_params
from lm.hf.exporting import export_folder
from lm.hf.packed_weights import pack
from lm.types import Tokens

LLAMA = {"model.positions": "rotary", "model.activation": "swiglu", "model.norm": "rms"}
BASE = {"model.base_embed_dim": 32, "model.base_num_layers": 2, "model.base_head_dim": 16}
LLAMA |= {"model.embed_dim": 64, "model.num_kv_heads": 2, "model.mlp_dim": 96}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights", [WeightFormat("int8"), WeightFormat("int4", 32)], ids=str)
def test_transformers_has_the_same_logits(make_experiment, tmp_path, weights, tied):
    pytest.importorskip("compressed_tensors")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    experiment = make_experiment({**LLAMA, "model.tie_embeddings": tied})
    params = experiment.init_state().params
    out = str(tmp_path / "out")
    assert export_folder(experiment, params, out, weights=weights, say=str) == "llama"
    with safe_open(f"{out}/model.safetensors", "np") as tensors:
        stored = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    up = stored["model.layers.1.mlp.up_proj.weight_packed"]
    assert up.dtype == np.int32 and up.shape == (
        96,
        64 * (8 if weights.name == "int8" else 4) // 32,
    )
    ids = np.random.default_rng(0).integers(0, 259, (2, 24)).astype(np.int32)
    small = quantize_params(params, experiment.boxed_params, experiment.param_rules, weights)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), ids.shape)
    tokens = Tokens(ids, np.ones_like(ids), positions)
    hidden = experiment.model.apply({"params": small}, tokens).hidden
    own = np.asarray(experiment.model.apply({"params": small}, hidden, method="logits"))
    floats = experiment.model.apply({"params": params}, tokens).hidden
    floats = np.asarray(experiment.model.apply({"params": params}, floats, method="logits"))
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        other = model(torch.tensor(ids)).logits.numpy()
    size = np.abs(own).max()
    np.testing.assert_allclose(other, own, atol=2e-5 * size)
    assert np.abs(floats - own).max() > 1e-3 * size  # the integers were read, not the floats


def test_integers_are_packed_from_the_low_bits_up():
    q = np.array([[-7, 7, 0, 1, -1, 2, 3, 4, 5]])
    assert pack(q, 4).view(np.uint32).tolist() == [[0xCBA798F1, 0x0000000D]]
    assert pack(np.array([[-127, 127, 0, 1]]), 8).view(np.uint32).tolist() == [[0x8180FF01]]


@pytest.mark.parametrize(
    "changes, dtype, message",
    [
        ({"model.mlp_dim": 80}, "float32", r"--group \(32\) must divide its 80 inputs"),
        ({}, "bfloat16", "--dtype=bfloat16 would round them"),
        ({"model.parametrization": "mup", **BASE}, "float32", "parametrization=mup scales weights"),
    ],
)
def test_what_would_not_be_exact_is_refused(make_experiment, tmp_path, changes, dtype, message):
    experiment = make_experiment({**LLAMA, **changes})
    params, weights = experiment.init_state().params, WeightFormat("int4")
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        export_folder(experiment, params, out, dtype=dtype, weights=weights, say=str)


@pytest.mark.slow
def test_the_scripts_take_the_flags(make_experiment, tmp_path, monkeypatch, capsys):
    """A run is evaluated in 4 bits, exported, and `lm weights-table` has the same loss."""
    from lm.preparation.token_writer import write_store
    from lm.sources import Document
    from lm.tokenizers import tokenizer
    from lm.training.loop import train
    from scripts import evaluate, hf_export, weights_table

    store, run = str(tmp_path / "store"), str(tmp_path / "run")
    write_store(store, [Document("0", {"text": "one two three " * 40})], tokenizer.load("bytes"))
    changes = {**LLAMA, "data.validation": (store,), "train.num_steps": 1}
    experiment = make_experiment(changes | {"guard.self_check": False})
    assert train(experiment.config_dict, run, experiment.rules.mesh.devices.flatten()) == 0
    capsys.readouterr()

    def call(script, *flags):
        monkeypatch.setattr(sys, "argv", [script.__name__, f"--workdir={run}", *flags])
        assert script.main() == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]

    whole, small = call(evaluate)[0]["loss"], call(evaluate, "--weights=int4")[0]["loss"]
    assert whole != small and abs(small / whole - 1) < 0.02
    lines = call(weights_table, "--new=4", "--repeats=1")
    assert [line["group"] for line in lines] == [None, None, 32, 64, 128]
    assert lines[0]["loss"] == whole and lines[2]["loss"] == small
    assert lines[2]["bytes"] < lines[1]["bytes"] < lines[0]["bytes"]
    call(hf_export, f"--out={tmp_path / 'out'}", "--weights=int8")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 8
    with pytest.raises(ValueError, match=r"--group \(64\) is for --weights=int4, not int8"):
        call(evaluate, "--weights=int8", "--group=64")
