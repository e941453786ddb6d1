"""The environment of processes that tests start, and scripts without a process of their own."""

import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from lm import cli

SCRIPTS = Path(__file__).parents[1] / "scripts"


def fake_devices(count: int) -> dict[str, str]:
    """That of this process, with `count` fake devices instead of eight: compiling stays quick."""
    flag = "--xla_force_host_platform_device_count"
    flags = re.sub(rf"{flag}=\d+", f"{flag}={count}", os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def some(cases: Iterable[Any], *usual: Any) -> list[Any]:
    """The cases by name; those that are not `usual` repeat them in other words, and are slow."""
    cases = list(cases)
    assert set(usual) <= set(cases)
    return [c if c in usual else pytest.param(c, marks=pytest.mark.slow) for c in cases]


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """The exit code and output of scripts/NAME.py, run in this process.

    For tests of what a script says: a process of its own imports JAX for seconds first. What a
    start sets for a whole process (huge pages, the compilation cache, logging) is left out.
    """
    out, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    code: object = 0
    with pytest.MonkeyPatch.context() as patch:
        for function in ("_use_huge_pages", "_set_up"):
            patch.setattr(cli, function, lambda: None)
        patch.setattr(sys, "argv", [str(SCRIPTS / f"{name}.py"), *map(str, arguments)])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", errors)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
    if isinstance(code, str):  # of sys.exit("error: ...")
        errors.write(f"{code}\n")
        code = 1
    for stream in (out, errors):
        stream.flush()
    texts = (stream.buffer.getvalue().decode() for stream in (out, errors))
    return subprocess.CompletedProcess([name, *arguments], int(code or 0), *texts)
