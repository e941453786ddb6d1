"""The environment of processes that tests start."""

import os
import re


def fake_devices(count: int) -> dict[str, str]:
    """That of this process, with `count` fake devices instead of eight: compiling stays quick."""
    flag = "--xla_force_host_platform_device_count"
    flags = re.sub(rf"{flag}=\d+", f"{flag}={count}", os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
