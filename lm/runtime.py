"""What a process sets up once, before JAX is first used."""

from __future__ import annotations

import os

import jax
from absl import logging


def start() -> None:
    """Turns the persistent compilation cache on, and libraries' chatter off.

    The cache lies in ~/.cache/lm unless JAX_COMPILATION_CACHE_DIR names another place.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax tells some thirty lines a save
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "lm", "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
