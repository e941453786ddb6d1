"""The environment of processes that tests start."""

import os
import re
from collections.abc import Iterable
from typing import Any

import pytest


def fake_devices(count: int) -> dict[str, str]:
    """That of this process, with `count` fake devices instead of eight: compiling stays quick."""
    flag = "--xla_force_host_platform_device_count"
    flags = re.sub(rf"{flag}=\d+", f"{flag}={count}", os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def some(cases: Iterable[str], *usual: str) -> list[Any]:
    """The cases by name; those that are not `usual` repeat them in other words, and are slow."""
    cases = list(cases)
    assert set(usual) <= set(cases)
    return [c if c in usual else pytest.param(c, marks=pytest.mark.slow) for c in cases]
