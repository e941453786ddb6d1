"""The package as pip installs it: beside the repository's own way of `requirements.txt`."""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lm import cli

ROOT = Path(__file__).parents[1]
BUILD = """
from setuptools import build_meta
print(build_meta.prepare_metadata_for_build_wheel("."))
"""


def _imported():
    """Top-level names that files of the package import, in functions too."""
    names = set()
    for path in ROOT.glob("lm/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return (
        names - set(sys.stdlib_module_names) - {"lm", "_typeshed", "jaxlib"}
    )  # _typeshed is for types alone, jaxlib a part of jax


def _normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirements(folder):
    """Those that pip reads from a wheel of the package; of an extra with its marker."""
    (folder / "lm").mkdir()
    (folder / "lm" / "__init__.py").touch()
    for path in (ROOT / "pyproject.toml", *ROOT.glob("requirements*.txt")):
        shutil.copy(path, folder / path.name)
    command = [sys.executable, "-c", BUILD]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    [found] = folder.glob("*.dist-info/METADATA")
    lines = found.read_text().splitlines()
    return [Requirement(line.split(": ", 1)[1]) for line in lines if line.startswith("Requires-D")]


def test_an_installed_package_asks_for_what_it_imports(tmp_path):
    pytest.importorskip("setuptools")
    asked = {_normal(r.name) for r in _requirements(tmp_path) if r.marker is None}
    owners = metadata.packages_distributions()
    lacking = {
        name
        for name in _imported()
        if not {_normal(owner) for owner in owners.get(name, [name])} & asked
    }
    # jax asks for two of them; of the others requirements-parity.txt, -data.txt, -gs.txt and
    # -trackers.txt speak
    extras = {"lm_eval", "torch", "datatrove", "trafilatura", "warcio", "gcsfs", "mlflow", "wandb"}
    assert lacking == {"ml_dtypes", "scipy"} | extras


def test_extras_name_those_of_jax(tmp_path):
    pytest.importorskip("setuptools")
    found = {(r.name, *r.extras) for r in _requirements(tmp_path) if r.marker is not None}
    assert {("jax", "tpu"), ("jax", "cuda13"), ("pytest",), ("ruff",)} <= found


def test_the_pins_of_ci_satisfy_the_requirements(tmp_path):
    pytest.importorskip("setuptools")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {_normal(r.name): r for line in lines if line[0] != "#" for r in [Requirement(line)]}
    for asked in _requirements(tmp_path):
        [pin] = pins[_normal(asked.name)].specifier
        assert pin.operator == "==" and asked.specifier.contains(pin.version), (asked, pin)


def test_nothing_but_the_installation_puts_the_project_on_the_path():
    files = [*ROOT.glob("scripts/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("lm/**/*.py")]
    change = re.compile(r"\bsys\.path\.(insert|append|pop|extend)\(")
    assert not [path.name for path in files if change.search(path.read_text())]


def _run(*command):
    # as a user starts it: a script sets its own, and starts again
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    options = {"capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(command, cwd=ROOT, env=environment, **options)
    return done.returncode, done.stdout, done.stderr


def test_lm_lists_every_script_with_a_line():
    code, out, _ = _run(sys.executable, "-m", "lm", "--help")
    listed = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  "))
    assert code == 0
    assert {n.replace("-", "_") for n in listed} == {p.stem for p in ROOT.glob("scripts/*.py")}
    assert _run(sys.executable, "-m", "lm", "trian") == (
        2, "", "error: no command trian; did you mean train? (lm --help lists them)\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--config=configs/smoke.py", "--config.seed=x", "--workdir=runs/x"),
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in (
                ("train", "--help"),
                ("train", "--process_ids=3"),
                ("evaluate", "--workdir=nowhere", "--batch_size=2"),
                ("evaluate", "--workdir=nowhere", "--bacth-size=2"),
            )
        ),
        ("evaluate", "--help"),
    ],
    ids=" ".join,
)
def test_lm_does_as_the_script_does(command):
    name, *flags = command
    [script] = ROOT.glob(f"scripts/{name}.py")
    as_script = _run(sys.executable, str(script), *flags)
    assert _run(sys.executable, "-m", "lm", name, *flags) == as_script
    assert "Traceback" not in as_script[2]


def test_flags_are_spelled_with_dashes_and_underscores_are_taken():
    given = ["x", "--num_beams=a_b", "--config.train.num_steps=3", "--noa_b", "-a_b"]
    words = [*given, "--", "--not_a_flag"]
    expected = ["x", "--num-beams=a_b", given[2], "--noa-b", "-a_b", "--", "--not_a_flag"]
    assert cli.with_dashes(words) == expected
    defined = re.compile(r"(?:DEFINE_\w+|\badd(?:_argument)?)\(\s*\"(?:--)?([a-z_-]+)\"")
    for path in [*ROOT.glob("scripts/**/*.py"), *ROOT.glob("lm/**/*.py")]:
        assert not [n for n in defined.findall(path.read_text()) if "_" in n], path
