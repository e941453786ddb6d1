"""The start of a script."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import run_script

from lm import cli
from lm.exit_codes import Exit
from lm.parallel import device_errors

PROGRAM = """
from lm import cli as runtime

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
    done = run_script("train", "--config=configs/tiny.py", "--explain", *flags)
    known = "nothing" not in expected
    assert (done.returncode == 0) == known, done.stderr
    if known:
        assert expected in " ".join(done.stdout.split()), done.stdout
    else:
        assert done.stderr.startswith("error: ") and expected in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_package_that_is_not_installed_is_one_line():
    """lm_eval, which requirements.txt leaves out; and before the run is looked at."""
    hide = "import sys; sys.modules['lm_eval'] = None; import runpy; sys.argv[0] = 'lm_eval.py'; "
    start = "runpy.run_path('scripts/lm_eval.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", hide + start, "--workdir=never", "--tasks=a"],
        env={**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},  # no second start
        capture_output=True,
        text=True,
        timeout=300,
    )
    expected = "error: lm_eval is needed here and not installed: pip install lm_eval\n"
    assert (done.returncode, done.stderr) == (1, expected)


@pytest.mark.parametrize(
    ("script", "missing"),
    [("train", "--config"), ("evaluate", "--workdir"), ("prepare_data", "--tokenizer")],
)
def test_a_missing_flag_is_one_line_and_a_code_of_its_own(script, missing):
    done = run_script(script)
    assert (done.returncode, done.stdout) == (Exit.USAGE, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and missing in line


def test_errors_name_the_flag_in_place_of_the_path_that_it_sets():
    with (
        pytest.raises(ValueError, match=r"^--data: gone: no such folder; config\.data\.train$"),
        cli.named_by_flags({"config.data.validation": "--data"}),
    ):
        raise ValueError("config.data.validation: gone: no such folder; config.data.train")


def test_a_config_that_is_not_there_is_one_line():
    done = run_script("train", "--config=configs/tinny.py", "--workdir=never")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config=configs/tinny.py: no such file")
    assert done.stderr.count("\n") == 1


def test_errors_of_the_machine_have_codes_and_those_of_a_program_a_traceback():
    assert device_errors.exit_code(RuntimeError("INTERNAL: out of memory")) is None
    for code, make in (
        (Exit.OUT_OF_MEMORY, lambda: jax.block_until_ready(jnp.zeros((2**50,), jnp.int8))),
        (Exit.OUT_OF_MEMORY, lambda: np.ones((2**60,), np.int8)),
        (Exit.DEVICE_ERROR, lambda: jax.block_until_ready(_with_a_failing_callback(1.0))),
    ):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            make()
        assert device_errors.exit_code(caught.value) == code
        line = device_errors.describe(code, caught.value)
        assert "\n" not in line and line.startswith(device_errors.KINDS[code])
    wrong = jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes differ")
    assert device_errors.exit_code(wrong) is None


@jax.jit
def _with_a_failing_callback(x):
    def fail(x):
        raise OSError("the link to the chip is down")

    return jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), x)
