"""The dependency rule, read from the source: nothing imports upward, heavy packages load late."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob("lm/**/*.py"))
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}

# What a module or package may import from lm. The longest name that fits counts; a package may
# always import itself. `config` is for `field`, with which sections and components declare their
# fields.
LEAF = (
    "lm.types",
    "lm.config",
    "lm.config_tree",
    "lm.sharding",
    "lm.parameters",
    "lm.parametrization",
)
RULES = {
    "lm": (),
    "lm.types": (),
    "lm.config": (),
    "lm.config_tree": ("lm.config",),
    "lm.exits": (),
    "lm.device_errors": ("lm.exits",),
    "lm.lines": (),
    "lm.parameters": (),
    "lm.parametrization": (),
    "lm.phases": (),
    "lm.storage": (),
    "lm.processes": ("lm.exits",),
    "lm.checkpoint.manifest": (),
    "lm.config_flag": ("lm.config_tree", "lm.storage"),
    "lm.runtime": ("lm.config_flag", "lm.device_errors", "lm.exits", "lm.processes"),
    "lm.sharding": ("lm.types", "lm.config"),
    "lm.layouts": (),
    "lm.flops": ("lm.types", "lm.config", "lm.layouts"),
    "lm.scaling": ("lm.types", "lm.config"),
    "lm.scaling.figures": ("lm.scaling", "lm.metrics"),
    "lm.scaling.report": ("lm.scaling", "lm.metrics"),
    "lm.data": ("lm.types", "lm.config", "lm.exits", "lm.storage"),
    "lm.objectives": (
        "lm.types",
        "lm.config",
        "lm.data.sources",
        "lm.data.streams",
        "lm.data.tokenizer",
    ),
    "lm.layers": LEAF,
    "lm.layers.chunking": ("lm.types",),
    "lm.models": (*LEAF, "lm.layers"),
    "lm.loss": (*LEAF, "lm.layers.chunking"),
    "lm.schedule": LEAF,
    "lm.muon": (),
    "lm.adafactor": ("lm.types",),
    "lm.optimizers": (*LEAF, "lm.muon", "lm.adafactor"),
    "lm.optim": (*LEAF, "lm.schedule", "lm.adafactor", "lm.optimizers"),
    "lm.noise_scale": LEAF,
    "lm.step": (*LEAF, "lm.checkpoint.manifest", "lm.noise_scale", "lm.optim"),
    "lm.checkpoint": (*LEAF, "lm.device_errors", "lm.exits", "lm.processes", "lm.storage"),
    "lm.branch": (*LEAF, "lm.checkpoint", "lm.schedule"),
    "lm.start": (*LEAF, "lm.checkpoint", "lm.data", "lm.layers"),
    "lm.metrics": (*LEAF, "lm.lines"),
    "lm.sweep": (
        "lm.config_tree",
        "lm.exits",
        "lm.guard",
        "lm.metrics",
        "lm.results",
        "lm.telemetry.fonts",
    ),
    "lm.results": (
        "lm.config",
        "lm.config_tree",
        "lm.flops",
        "lm.ledger",
        "lm.lines",
        "lm.metrics",
    ),
    "lm.generation": (*LEAF, "lm.layers.chunking"),
    "lm.task_metrics": (),
    "lm.task_baselines": ("lm.task_metrics",),
    "lm.harness": (*LEAF, "lm.generation", "lm.metrics"),
    "lm.blimp": (*LEAF, "lm.generation"),
    "lm.hf": LEAF,
    "lm.hf.importing": ("lm",),
    "lm.hf.exporting": ("lm",),
    "lm.hf.vocabulary": (
        *("lm.data.run_tokenizer", "lm.data.special_tokens", "lm.data.tokenizer"),
        "lm.hf.files",
    ),
    "lm.guard": (*LEAF, "lm.exits", "lm.phases", "lm.processes"),
    "lm.ledger": ("lm.exits", "lm.lines"),
    "lm.goodput": ("lm.lines", "lm.phases"),
    "lm.reference": LEAF,
    "lm.selfcheck": (*LEAF, "lm.exits", "lm.layers", "lm.loss", "lm.reference"),
    "lm.plot": (*LEAF, "lm.metrics", "lm.telemetry.fonts"),
    "lm.telemetry": (),
    "lm.experiment": ("lm",),
    "lm.evaluate": ("lm",),
    "lm.diagnose": ("lm",),
    "lm.run": ("lm",),
    "lm.training": ("lm",),
    "lm.rewind": ("lm",),
    "lm.train": ("lm",),
    "lm.aot": ("lm",),
    "lm.verify": ("lm",),
    "lm.inside": ("lm.types", "lm.layers"),
    "lm.inspect": ("lm",),
    "lm.coordinates": ("lm",),
    "lm.transfer": ("lm",),
    "lm.predict": ("lm",),
    "lm.merging": ("lm",),
    "lm.figures": ("lm",),
    "lm.rows": ("lm",),
    "lm.show": ("lm",),
}
# The top of the stack, which only what stands here may import.
TOP = {
    "lm.experiment": (
        "lm.evaluate",
        "lm.diagnose",
        "lm.run",
        "lm.rewind",
        "lm.train",
        "lm.training",
        "lm.aot",
        "lm.inspect",
        "lm.coordinates",
        "lm.transfer",
        "lm.verify",
        "lm.show",
        "lm.hf.importing",
        "lm.hf.exporting",
        "lm.predict",
        "lm.merging",
    ),
    "lm.evaluate": ("lm.run",),
    "lm.diagnose": ("lm.run", "lm.rewind", "lm.train"),
    "lm.run": ("lm.rewind", "lm.train"),
    "lm.rewind": ("lm.train",),
    "lm.train": (),
    "lm.aot": (),
    "lm.verify": (),
    "lm.coordinates": ("lm.transfer",),
    "lm.transfer": (),
    "lm.predict": (),
    "lm.merging": (),
    "lm.inspect": ("lm.show", "lm.rows"),
    "lm.show": ("lm.figures", "lm.rows"),
    "lm.figures": (),
    "lm.rows": (),
    "lm.hf.importing": ("lm.hf.exporting",),
    "lm.hf.exporting": (),
}
LATE = {
    "jinja2",
    "lm_eval",
    "matplotlib",
    "optuna",
    "pyarrow",
    "rouge_score",
    "sacrebleu",
    "safetensors",
    "sentencepiece",
    "sklearn",
    "tensorboard",
    "tensorflow",
    "tensorflow_datasets",
    "tensorstore",
    "tokenizers",
    "torch",
    "transformers",
    "zstandard",
}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
TENSORFLOW_FILES = {"lm.data.loaders", "lm.data.sources.tfds"}


@dataclasses.dataclass(frozen=True)
class Import:
    name: str  # of the module
    line: int
    at_start: bool  # runs when the importing module is imported

    @property
    def package(self):
        return self.name.split(".")[0]


def imports(source):
    """Every import statement of a source text, wherever it stands."""

    def visit(node, at_start):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_start)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"line {node.lineno}: write the full name, not a relative import"
            )
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                name = inner if inner in MODULES else node.module
                yield Import(name, node.lineno, at_start)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_start = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_start)

    return list(visit(ast.parse(source), True))


def within(name, package):
    return name == package or name.startswith(package + ".")


def home(name):
    """The row of RULES for a module."""
    fits = [row for row in RULES if (name == row if row == "lm" else within(name, row))]
    assert fits, f"{name} has no row in RULES: say what it may import"
    return max(fits, key=len)


def violations(name, source):
    """What a module of this name would import against the rule."""
    row = home(name)
    wrong = []
    for found in imports(source):
        if found.package != "lm":
            if found.package in ("scripts", "configs", "tests", "notebooks"):
                wrong.append(found)
            continue
        if within(found.name, row) and row != "lm":
            continue
        if not any(within(found.name, allowed) for allowed in RULES[row]):
            wrong.append(found)
        owners = [users for top, users in TOP.items() if within(found.name, top)]
        if owners and row not in owners[0]:
            wrong.append(found)
    return [f"{name}, line {found.line}: imports {found.name}" for found in wrong]


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_upward(name):
    assert not violations(name, MODULES[name].read_text())


@pytest.mark.parametrize(
    "name, source",
    [
        ("lm.data.new", "import lm.models.decoder"),
        ("lm.data.new", "def f():\n    from lm import sharding"),
        ("lm.objectives.new", "from lm.data import pipeline"),
        ("lm.layers.new", "from lm.models.decoder import Config"),
        ("lm.loss", "from lm.models import decoder"),
        ("lm.optim", "from lm import loss"),
        ("lm.evaluate", "from lm import train"),
        ("lm.experiment", "from lm.evaluate import evaluate"),
        ("lm.types", "from lm.config import field"),
        ("lm.train", "import scripts.train"),
    ],
)
def test_the_rule_finds_an_upward_import(name, source):
    assert violations(name, source)


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith(("lm.data", "lm.objectives"))])
def test_data_and_objectives_never_import_jax(name):
    found = [i for i in imports(MODULES[name].read_text()) if i.package in JAX]
    assert not found, f"{name}: numpy only"


@pytest.mark.parametrize("path", [*FILES, *sorted(ROOT.glob("scripts/**/*.py"))], ids=str)
def test_heavy_packages_are_imported_where_they_are_used(path):
    found = [i for i in imports(path.read_text()) if i.package in LATE and i.at_start]
    assert not found, f"{path}: import it inside the function that needs it"


@pytest.mark.parametrize("name", MODULES)
def test_tensorflow_is_for_the_loader_and_tfds_alone(name):
    wanted = {i.package for i in imports(MODULES[name].read_text())}
    assert name in TENSORFLOW_FILES or not wanted & {"tensorflow", "tensorflow_datasets"}


def loaded_after(*modules):
    """The top-level packages in sys.modules of a fresh process that imports these."""
    code = f"import sys, {', '.join(modules)}; print(*{{m.split('.')[0] for m in sys.modules}})"
    run = [sys.executable, "-c", code]
    return set(
        subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    )


def test_config_loads_without_jax_and_data_without_tensorflow():
    assert not loaded_after("lm.config", "lm.config_tree") & (LATE | JAX)
    data = [n for n in MODULES if n.startswith(("lm.data", "lm.objectives"))]
    assert not loaded_after("lm.config", *data) & {
        "tensorflow",
        "tensorflow_datasets",
        "matplotlib",
    }


def test_training_starts_without_what_it_may_not_need():
    late = {"tensorflow", "tensorflow_datasets", "matplotlib", "sentencepiece", "tokenizers"}
    assert not loaded_after("lm.train") & late
