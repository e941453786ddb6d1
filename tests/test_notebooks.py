"""Every notebook runs on a finished run, defines nothing, and is saved clean."""

import ast
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import numpy as np
import pytest
from environment import some
from nbclient import NotebookClient

from configs import clip, vae
from lm.data import shapes
from lm.interpret import picture_search
from lm.preparation import prepare, tokenizer_training
from lm.preparation.corpus import Corpus
from lm.training.loop import train

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SCALING = Path(__file__).parents[1] / "notebooks" / "04_scaling.ipynb"  # needs no run
PICTURES = Path(__file__).parents[1] / "notebooks" / "05_pictures.ipynb"  # of a run of two towers
LATENT = Path(__file__).parents[1] / "notebooks" / "06_latent.ipynb"  # of a run of vae
OF_RUNS = [path for path in NOTEBOOKS if path not in (SCALING, PICTURES, LATENT)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_config, devices):
    """The folder of a finished run on a few files of Python's standard library."""
    folder = tmp_path_factory.mktemp("run")
    corpus = Corpus(
        data=[str(Path(sysconfig.get_path("stdlib")) / "json" / "*.py")],
        split="tail",
        validation_fraction=0.2,
    )
    tokenizer = str(folder / "tokenizer.model")
    tokenizer_training.train_tokenizer(
        corpus,
        out=tokenizer,
        vocab_size=400,
        model_type="bpe",
        piece_span="line",
        split_digits=False,
        sample_bytes=1_000_000,
    )
    prepare.prepare(corpus, tokenizer=tokenizer, out=folder / "stores", num_workers=1)
    changes = {
        "data.tokenizer": tokenizer,
        "data.train": (str(folder / "stores" / "train"),),
        "data.validation": (str(folder / "stores" / "validation"),),
        "data.length": 64,
        "data.batch_size": 8,
        "model.vocab_size": 400,
        "model.max_length": 128,
        "train.num_steps": 30,
        "train.eval_every": 10,
        "log.layers_every": 10,
    }
    assert train(make_config(changes), str(folder / "run"), devices[:1]) == 0
    return str(folder / "run")


def parameters(notebook):
    """The one cell that says which run to look at."""
    [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    return cell


def execute(path, source=None):
    """The kinds of output of every cell; with other parameters if `source` is given."""
    notebook = nbformat.read(path, as_version=4)
    if source is not None:
        parameters(notebook)["source"] = source
    where = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where)
    client.execute()
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    return [kind for o in outputs for kind in o.get("data", {"stream": 0})]


@pytest.mark.parametrize("path", OF_RUNS, ids=lambda path: path.stem)
def test_the_notebook_runs_on_a_finished_run(path, run):
    kinds = execute(path, f"workdir = {run!r}")
    assert kinds.count("image/png") >= 5 and kinds.count("text/html") >= 3


@pytest.mark.slow  # its functions: tests/test_scaling.py
def test_the_notebook_of_scaling_laws_runs_on_the_shipped_table():
    kinds = execute(SCALING)
    assert kinds.count("image/png") == 5 and kinds.count("stream") == 4


@pytest.mark.slow
def test_the_notebook_of_pictures_runs_on_a_run_of_two_towers(tmp_path, devices):
    config = clip.get_config("shapes")
    for tower in (config.model.vision, config.model.text):
        tower.update({"num_layers": 1, "embed_dim": 16, "mlp_dim": 16})
    config.data.validation = ("synthetic:shapes:40:1:held_out",)
    config.data.batch_size, config.train.num_steps, config.loader.kind = 16, 2, "thread"
    config.optimizer.schedule.warmup_steps = 0
    folder = str(tmp_path / "run")
    assert train(config, folder, devices[:1]) == 0
    kinds = execute(PICTURES, f"workdir = {folder!r}")
    assert kinds.count("image/png") == 2 and kinds.count("text/html") == 1
    found = picture_search.Embedded.load(f"{folder}/embeddings.npz")
    assert found.images.shape == (40, 32, 32, 3) and found.pictures.shape == (40, 64)
    assert found.captions[0] in [scene.caption for scene in shapes.arrangements("held_out")]
    np.testing.assert_allclose(np.linalg.norm(found.texts, axis=1), 1, rtol=1e-5)
    assert (picture_search.nearest(found.pictures, found.pictures, 3)[:, 0] == np.arange(40)).all()


@pytest.mark.slow
def test_the_notebook_of_latents_runs_on_a_run_of_sentences(tmp_path, devices):
    config = vae.get_config()
    config.model.update({"embed_dim": 16, "hidden_dim": 16, "latent_dim": 4, "vocab_size": 264})
    config.data.update({"length": 64, "encoder_length": 64, "batch_size": 8, "tokenizer": "bytes"})
    config.data.train, config.data.validation = ("synthetic:copy",), ("synthetic:random:20",)
    config.train.num_steps, config.train.eval_every, config.loader.kind = 2, 0, "thread"
    config.optimizer.schedule.warmup_steps = 0
    folder = str(tmp_path / "run")
    assert train(config, folder, devices[:1]) == 0
    kinds = execute(LATENT, f"workdir = {folder!r}")
    assert kinds.count("text/html") == 1 and kinds.count("stream") >= 3


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"
)
@pytest.mark.parametrize("path", some(OF_RUNS, OF_RUNS[0]), ids=lambda path: path.stem)
def test_the_notebook_begins_without_complaints_of_the_tpu_compiler(path):
    """JAX looks for a TPU where it does not know that there is none."""
    notebook = nbformat.read(path, as_version=4)
    imports = next(c.source for c in notebook.cells if "import jax" in c.source)
    lines = [line for line in imports.split("\n") if not line.startswith("%")]
    code = "\n".join([*lines, "jax.devices()"])
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=path.parent,
        env={**environment, "PYTHONPATH": str(path.parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_defines_nothing_and_is_saved_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    name = "table_path" if path == SCALING else "workdir"
    assert parameters(notebook).source.startswith(f"{name} = ")
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        assert not cell.outputs and cell.execution_count is None
        lines = [line for line in cell.source.split("\n") if not line.startswith("%")]
        nodes = list(ast.walk(ast.parse("\n".join(lines))))
        assert len(lines) <= 20
        assert not [n for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Lambda)]
