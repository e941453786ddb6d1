"""Imports from the kinds of files that there are, what they refuse, and runs that go on."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from lm.checkpoint import step_files
from lm.checkpoint.arrays import StoredArrays
from lm.config import command_line, conversion
from lm.hf.exporting import export_folder
from lm.hf.files import open_tensors, write_tensors
from lm.hf.importing import import_folder
from lm.training.loop import train
from lm.training.restore import restore_params
from lm.training.stored_run import load
from tests import hf_models

torch = pytest.importorskip("torch", reason="the folders are made with PyTorch")
pytest.importorskip("transformers", reason="the folders are made with transformers")


def quiet(line):
    del line


def small_config(**changes):
    config = conversion.default()
    values = {"data.length": 24, "data.batch_size": 4, "train.num_steps": 3}
    values |= {"data.train": ("synthetic:markov",), "loader.kind": "thread"}
    values |= {"log.trackers": ("jsonl",), "log.parameter_table": False, "guard.self_check": False}
    config.update_from_flattened_dict({**values, **changes})
    return config


@pytest.fixture(scope="module")
def theirs():
    return hf_models.make("llama3")


@pytest.fixture
def bring(tmp_path, devices):
    """folder -> the parameters of its import, {name: array}."""

    def make(folder, **options):
        workdir = tmp_path / "run"
        shutil.rmtree(workdir, ignore_errors=True)
        options = {"tokenizer": "bytes", "say": quiet, **options}
        import_folder(str(folder), str(workdir), small_config(), devices[:1], **options)
        place = workdir / "checkpoints" / "0"
        leaves = step_files.read_manifest(place).leaves
        return {name: StoredArrays(place, leaves).read(name) for name in leaves}

    return make


@pytest.fixture
def plain(theirs, tmp_path, bring):
    """A folder with one safetensors file, and the parameters in it."""
    theirs.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain", bring(tmp_path / "plain")


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def write(folder, tensors):
    write_tensors(folder, {n: x.shape for n, x in tensors.items()}, tensors.get, "float32")


def read(folder):
    return {name: tensor.read() for name, tensor in open_tensors(folder).items()}


def test_shards_bin_files_and_bare_models_give_the_same_parameters(theirs, plain, bring, tmp_path):
    folder, params = plain
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 3
    assert equal(bring(tmp_path / "shards"), params)

    theirs.model.save_pretrained(tmp_path / "bare")
    assert "embed_tokens.weight" in open_tensors(tmp_path / "bare")
    assert equal(bring(tmp_path / "bare"), params)

    state = theirs.state_dict()
    assert "lm_head.weight" in state  # a tied copy
    names = sorted(state)
    halves = names[::2], names[1::2]
    (tmp_path / "bin").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "bin")
    index = {}
    for i, half in enumerate(halves):
        torch.save({name: state[name] for name in half}, tmp_path / "bin" / f"{i}.bin")
        index |= dict.fromkeys(half, f"{i}.bin")
    text = json.dumps({"weight_map": index})
    (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(text)
    assert equal(bring(tmp_path / "bin"), params)


def test_bfloat16_comes_in_exactly_and_goes_out_with_the_same_bytes(
    theirs, plain, bring, tmp_path, devices
):
    folder, params = plain
    narrow = {name: x.astype(ml_dtypes.bfloat16) for name, x in read(folder).items()}
    (tmp_path / "narrow").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "narrow")
    shapes = {name: x.shape for name, x in narrow.items()}
    write_tensors(tmp_path / "narrow", shapes, narrow.get, "bfloat16")
    found = bring(tmp_path / "narrow")
    assert all(
        np.array_equal(found[name], params[name].astype(ml_dtypes.bfloat16).astype(np.float32))
        for name in params
    )
    experiment = load(str(tmp_path / "run"), devices[:1])
    _, restored = restore_params(experiment, str(tmp_path / "run"))
    out = str(tmp_path / "out")
    options = {"family": "llama", "dtype": "bfloat16", "shard_bytes": 6_000, "say": quiet}
    export_folder(experiment, restored, out, **options)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = read(tmp_path / "out")
    assert again.keys() == narrow.keys()
    assert all(again[name].tobytes() == narrow[name].tobytes() for name in narrow)


def test_an_entry_too_large_for_float16_is_named_also_beside_an_infinite_one(
    plain, tmp_path, devices
):
    experiment = load(str(tmp_path / "run"), devices[:1])
    _, params = restore_params(experiment, str(tmp_path / "run"))
    options = {"dtype": "float16", "say": quiet}
    export_folder(experiment, params, str(tmp_path / "half"), **options)
    halves, whole = read(tmp_path / "half"), read(plain[0])
    assert all(np.array_equal(halves[name], whole[name].astype(np.float16)) for name in whole)
    params["norm"]["scale"] = np.array([7e4, np.inf, *np.ones(14)], np.float32)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has an entry of size 70000, too"):
        export_folder(experiment, params, str(tmp_path / "out"), **options)


def test_missing_unused_and_misshapen_tensors_are_all_listed(plain, bring, tmp_path):
    folder, _ = plain
    tensors = read(folder)
    last = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["score.weight"] = np.zeros((2, 16), np.float32)
    tensors["model.norm.weight"] = np.ones(17, np.float32)
    (tmp_path / "wrong").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "wrong")
    write(tmp_path / "wrong", tensors)
    with pytest.raises(ValueError) as error:
        bring(tmp_path / "wrong")
    text = str(error.value)
    assert "parameters without a tensor: model.layers.1.mlp.up_proj.weight [24, 16]\n" in text
    assert "tensors without a parameter (--skip=PATTERN leaves them out): score.weight" in text
    assert "model.norm.weight: [17] in the file, [16] by config.json" in text
    assert not list((tmp_path / "run").glob("checkpoints/*"))

    tensors |= {"model.layers.1.mlp.up_proj.weight": last}
    tensors |= {"model.norm.weight": np.ones(16, np.float32)}
    write(tmp_path / "wrong", tensors)
    bring(tmp_path / "wrong", skip=[r"score\..*"])


def test_a_tied_copy_that_differs_and_a_type_that_is_no_float_are_refused(plain, bring, tmp_path):
    folder, _ = plain
    tensors = read(folder)
    head = tensors["model.embed_tokens.weight"].copy()
    head[3, 4] += 1
    write(folder, {**tensors, "lm_head.weight": head})
    with pytest.raises(ValueError, match=r"lm_head\.weight and model\.embed_tokens\.weight"):
        bring(folder)
    from safetensors.numpy import save_file

    name = "model.norm.weight"
    save_file({**tensors, name: tensors[name].astype(np.int8)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"of others are model\.norm\.weight \(I8\)"):
        bring(folder)


def test_a_folder_without_tokenizer_and_one_in_use_are_refused(plain, tmp_path, devices):
    folder, _ = plain
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        import_folder(str(folder), str(tmp_path / "new"), small_config(), devices[:1], say=quiet)
    run = str(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run already"):
        import_folder(str(folder), run, small_config(), devices[:1], tokenizer="bytes", say=quiet)


def test_what_config_json_does_not_say_comes_from_the_config(plain, tmp_path, devices):
    folder, _ = plain
    changes = {"data.length": 500, "model.dtype": "bfloat16", "model.qkv_bias": True}
    said = []
    experiment = import_folder(
        str(folder),
        str(tmp_path / "new"),
        small_config(**changes, **{"model.pipeline.num_repeats": 2}),
        devices[:1],
        tokenizer="bytes",
        say=said.append,
    )
    model = experiment.config.model
    assert (model.dtype, model.pipeline.num_repeats, model.qkv_bias) == ("bfloat16", 2, False)
    assert experiment.config.data.length == 64 == model.max_length
    assert "config.data.length: 64 and not 500" in said[0]


def test_adapters_of_an_import_resume_where_flags_chose_the_objective(plain, tmp_path, devices):
    settings = (
        "objective.name=prefix", "model.lora.rank=2", f"init.from={tmp_path / 'run'}",
        "train.num_steps=2", "optimizer.schedule.warmup_steps=0",
    )  # fmt: skip

    def command():
        config = command_line.read(f"configs/imported.py:{tmp_path / 'run'}", settings)
        return train(config, str(tmp_path / "adapted"), devices[:1])

    assert command() == 0
    assert command() == 0  # was: another config


def test_training_goes_on_from_an_import_and_resumes_bit_by_bit(plain, tmp_path, devices):
    """Three steps in one go equal two, a save, and one; the first has the import's loss."""
    folder, _ = plain
    runs = {}
    for name in ("whole", "halves"):
        workdir = str(tmp_path / name)
        config = small_config(**{"checkpoint.every": 2, "checkpoint.keep_last": 9})
        import_folder(str(folder), workdir, config, devices[:1], tokenizer="bytes", say=quiet)
        config = conversion.from_json((tmp_path / name / "config.json").read_text())
        config.optimizer.schedule.kind = "constant"  # others depend on the number of steps
        if name == "halves":
            config.train.num_steps = 2
            assert train(config, workdir, devices[:1]) == 0
            config.train.num_steps = 3
        assert train(config, workdir, devices[:1]) == 0
        place = tmp_path / name / "checkpoints" / "3"
        runs[name] = step_files.read_manifest(place).leaves
    begun = step_files.read_manifest(tmp_path / "whole" / "checkpoints" / "0").leaves
    assert runs["whole"] == runs["halves"]
    assert any(name.startswith("opt_state.") for name in runs["whole"])
    assert all(begun[name].checksum != runs["whole"][name].checksum for name in begun)


POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 548118077
"""


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json"]
)
def test_a_git_lfs_pointer_is_named_as_such(name, plain, tmp_path, devices):
    folder, _ = plain
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer .*548,118,077.*git lfs"):
        import_folder(str(folder), str(tmp_path / "new"), small_config(), devices[:1], say=quiet)


def test_all_types_are_checked_before_anything_is_written(plain, tmp_path, bring):
    folder, _ = plain
    from safetensors.numpy import save_file

    tensors = read(folder)
    wrong = ("model.layers.1.mlp.up_proj.weight", "model.norm.weight")  # not the first to be read
    tensors |= {wrong[0]: tensors[wrong[0]].astype(np.int8)}
    tensors |= {wrong[1]: tensors[wrong[1]].astype(np.float64)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        bring(folder)
    assert all(text in str(error.value) for text in (f"{wrong[0]} (I8)", f"{wrong[1]} (F64)"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_that_are_no_numbers_are_named_and_not_imported_unasked(plain, tmp_path, bring):
    folder, _ = plain
    tensors = read(folder)
    tensors["model.norm.weight"][3] = np.nan
    tensors["model.layers.1.mlp.up_proj.weight"][2, :4] = np.inf
    write(folder, tensors)
    with pytest.raises(ValueError) as error:
        bring(folder)
    assert "model.norm.weight (1 of 16 entries)" in str(error.value)
    assert "model.layers.1.mlp.up_proj.weight (4 of 384 entries)" in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()
    assert not step_files.steps(epath.Path(tmp_path / "run" / "checkpoints"))
    said = []
    found = bring(folder, allow_nonfinite=True, say=said.append)
    assert np.isnan(found["params.norm.scale"]).sum() == 1
    assert any("model.norm.weight (1 of 16 entries)" in line for line in said)
    written = bring(folder, allow_nonfinite=True)  # over what the refused one left behind
    assert written.keys() == found.keys()


def test_an_unknown_key_of_config_json_is_ignored_when_named(plain, tmp_path, bring):
    folder, params = plain
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "world_size": 8}))
    with pytest.raises(ValueError, match=r"world_size = 8.*--ignore-key"):
        bring(folder)
    said = []
    assert equal(bring(folder, ignored=["world_size"], say=said.append), params)
    assert "ignored in config.json: world_size = 8" in said
