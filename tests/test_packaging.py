"""The package as pip installs it: beside the repository's own way of `requirements.txt`."""

import ast
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

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
    return names - set(sys.stdlib_module_names) - {"lm"}


def _normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_an_installed_package_asks_for_what_it_imports(tmp_path):
    pytest.importorskip("setuptools")
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "__init__.py").touch()
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-c", BUILD]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    [found] = tmp_path.glob("*.dist-info/METADATA")
    asked = {
        _normal(re.match(r"[\w.-]+", line.split(": ", 1)[1])[0])
        for line in found.read_text().splitlines()
        if line.startswith("Requires-Dist: ")
    }
    owners = metadata.packages_distributions()
    lacking = {
        name
        for name in _imported()
        if not {_normal(owner) for owner in owners.get(name, [name])} & asked
    }
    # jax asks for two of them; of the others requirements-parity.txt speaks
    assert lacking == {"ml_dtypes", "scipy", "lm_eval", "torch"}
