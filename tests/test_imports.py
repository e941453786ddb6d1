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

# A room may import from rooms on lower floors, and a file from its own room.
FLOORS = (
    ("types", "exit_codes", "storage"),
    ("config", "telemetry", "tokenizers"),
    ("data", "parallel", "optim", "sources"),
    ("kernels",),
    ("layers", "objectives", "checkpoint", "preparation", "cli", "__main__"),
    ("models", "generation", "reliability"),
    ("compression",),
    ("training", "compiled"),
    ("planning", "scaling", "evaluation", "interpret", "hf", "run_page", "probes"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LATE = {
    "PIL",
    "datatrove",
    "jinja2",
    "lm_eval",
    "matplotlib",
    "mlflow",
    "optuna",
    "phonenumbers",
    "py3langid",
    "pyarrow",
    "qwix",
    "rouge_score",
    "sacrebleu",
    "safetensors",
    "sentencepiece",
    "sklearn",
    "spacy",
    "stdnum",
    "tensorboard",
    "tensorflow",
    "tensorflow_datasets",
    "tensorstore",
    "tokenizers",
    "torch",
    "trafilatura",
    "transformers",
    "wandb",
    "warcio",
    "zstandard",
}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
NUMPY_ALONE = ("lm.data", "lm.preparation", "lm.sources", "lm.objectives", "lm.tokenizers")
TENSORFLOW_FILES = {"lm.data.loaders", "lm.sources.tfds"}


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
        only_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or only_for_types:
            at_start = False
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            at_start = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_start)

    return list(visit(ast.parse(source), True))


def room(module):
    """The folder of lm, or the file at its top, that a module is in."""
    name = module.split(".")[1]
    assert name in FLOOR, f"{module}: {name} is no room; put the file into one of {list(FLOOR)}"
    return name


def violations(module, source):
    """Imports of a module against the floors."""
    here = room(module)
    wrong = []
    for found in imports(source):
        if found.package in ("scripts", "configs", "tests", "notebooks"):
            wrong.append(found)
        elif found.package == "lm":
            there = room(found.name)
            if there != here and FLOOR[there] >= FLOOR[here]:
                wrong.append(found)
    return [f"{module}, line {found.line}: imports {found.name}" for found in wrong]


def test_no_import_runs_up_a_floor_or_across_it():
    files = {module: path for module, path in MODULES.items() if module != "lm"}
    assert [v for module, path in files.items() for v in violations(module, path.read_text())] == []


def test_the_table_has_every_room_and_no_other():
    assert {room(module) for module in MODULES if module != "lm"} == set(FLOOR)


@pytest.mark.parametrize(
    "module, source",
    [
        ("lm.data.new", "import lm.models.decoder"),
        ("lm.data.new", "def f():\n    from lm.parallel import sharding"),
        ("lm.objectives.new", "from lm.layers import norm"),
        ("lm.layers.new", "from lm.models.decoder import Config"),
        ("lm.optim.optimizers", "from lm.layers import cross_entropy"),
        ("lm.training.loop", "from lm.evaluation import predict"),
        ("lm.types", "from lm.config import field"),
        ("lm.training.loop", "import scripts.train"),
    ],
)
def test_the_rule_finds_an_import_that_runs_up(module, source):
    assert violations(module, source)


def found_in(paths, wrong):
    """file:line and module of every import in the files that is `wrong`."""
    files = {path.relative_to(ROOT): imports(path.read_text()) for path in paths}
    return [f"{path}:{i.line}: {i.name}" for path, all_ in files.items() for i in all_ if wrong(i)]


def test_data_and_objectives_never_import_jax():
    paths = [path for name, path in MODULES.items() if name.startswith(NUMPY_ALONE)]
    assert len(paths) > 20 and found_in(paths, lambda i: i.package in JAX) == []


def test_heavy_packages_are_imported_where_they_are_used():
    paths = [*FILES, *sorted(ROOT.glob("scripts/**/*.py"))]
    found = found_in(paths, lambda i: i.package in LATE and i.at_start)
    assert found == [], "import these inside the functions that need them"


def test_tensorflow_is_for_the_loader_and_tfds_alone():
    paths = [path for name, path in MODULES.items() if name not in TENSORFLOW_FILES]
    assert found_in(paths, lambda i: i.package in ("tensorflow", "tensorflow_datasets")) == []


def loaded_after(*modules):
    """The top-level packages in sys.modules of a fresh process that imports these."""
    code = f"import sys, {', '.join(modules)}; print(*{{m.split('.')[0] for m in sys.modules}})"
    run = [sys.executable, "-c", code]
    return set(
        subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    )


def test_config_loads_without_jax_and_data_without_tensorflow():
    assert not loaded_after("lm.config.schema", "lm.config.conversion") & (LATE | JAX)
    data = [n for n in MODULES if n.startswith(NUMPY_ALONE)]
    assert not loaded_after("lm.config.schema", *data) & {
        "tensorflow",
        "tensorflow_datasets",
        "matplotlib",
    }


def test_training_starts_without_what_it_may_not_need():
    late = {"tensorflow", "tensorflow_datasets", "matplotlib", "sentencepiece", "tokenizers"}
    assert not loaded_after("lm.training.loop") & late
