"""Plans by the oldest and the newest TPU compiler that pip gives: run with `-m compilers`.

Each is installed in an environment of its own: some ten minutes and 3 GB.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEWER = ("python3.14", "python3.13", "python3.12")  # what newer versions of jax ask for


def _runs(python):
    """True if it starts: the shim of a version manager may stand for none."""
    return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


@pytest.mark.compilers
@pytest.mark.parametrize(
    "pythons, wanted",
    [
        ((sys.executable,), ["jax[tpu]==0.10.0"]),  # the oldest that requirements.txt allows
        (NEWER, ["jax", "libtpu"]),
    ],
    ids=["oldest", "newest"],
)
def test_plans_are_right_with_this_compiler(pythons, wanted, tmp_path):
    found = [path for path in map(shutil.which, pythons) if path and _runs(path)]
    if not found:
        pytest.skip(f"needs one of {', '.join(pythons)}")
    subprocess.run([found[0], "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    if subprocess.run([python, "-m", "pip", "index", "versions", "libtpu"]).returncode:
        pytest.skip("pip finds no compiler here")
    install = [python, "-m", "pip", "install", "--quiet", "-e", ROOT]
    subprocess.run([*install, *wanted, "pytest", "hypothesis"], check=True)
    files = [ROOT / "tests" / name for name in ("test_aot.py", "test_search.py", "test_flops.py")]
    # flags of this process's XLA may be unknown to the other one, which then ends without a word
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = [python, "-m", "pytest", *files]
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout  # they need libtpu
