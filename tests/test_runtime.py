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
