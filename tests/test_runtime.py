"""How a script starts."""

import importlib.util
import os
import subprocess
import sys

import pytest

PROGRAM = """
from lm import runtime

def main():
    import jax
    print(jax.devices()[0].platform, jax.config.jax_platforms)
    return 0

runtime.run(main)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="nothing to skip: libtpu is not installed"
)
def test_a_compiler_for_tpus_is_not_asked_for_tpus():
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**environment, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "cpu cpu\n"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--config.train.num_steps=None"], "num_steps=None"),
        (["--config.train.num_steps=None", "--config.train.num_steps=7"], "num_steps=7"),
        (["--config.train.num_steps=7", "--config.train.num_steps=None"], "num_steps=None"),
        (["--config.train.nothing=None"], "nothing"),
    ],
)
def test_a_value_can_be_unset(flags, expected):
    done = subprocess.run(
        [sys.executable, "scripts/train.py", "--config=configs/tiny.py", "--explain", *flags],
        capture_output=True,
        text=True,
        timeout=300,
    )
    known = "nothing" not in expected
    assert (done.returncode == 0) == known, done.stderr
    if known:
        assert expected in " ".join(done.stdout.split()), done.stdout
    else:
        assert done.stderr.startswith("error: ") and expected in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_config_that_is_not_there_is_one_line():
    done = subprocess.run(
        [sys.executable, "scripts/train.py", "--config=configs/tinny.py", "--workdir=never"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config=configs/tinny.py: no such file")
    assert done.stderr.count("\n") == 1
