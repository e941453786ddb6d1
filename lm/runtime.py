"""How a script starts: flags with clear errors, and settings that must precede JAX."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

USER_ERRORS = (ValueError, FileNotFoundError, FloatingPointError)


def run(main: Callable[[Sequence[str]], int], *, allow_rest: bool = False) -> None:
    """`absl.app.run` in which a user's mistake is one line and exit code 1, not a traceback.

    With `allow_rest`, `main` gets the arguments that are no flags of absl's.
    """

    def guarded(argv: Sequence[str]) -> int:
        if len(argv) > 1 and not allow_rest:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        _start()
        try:
            return main(argv)
        except USER_ERRORS as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    _use_huge_pages()
    app.run(guarded, flags_parser=functools.partial(_parse, allow_rest))


def _use_huge_pages() -> None:
    """Starts this program again with glibc's huge pages, unless it has them; where there is no
    glibc, does nothing.

    XLA's CPU client takes fresh memory for the temporaries of every step. Mapping it in pages of 4
    KiB nearly halves the speed of training on a CPU, and glibc reads its settings only when a
    process starts.
    """
    name = "GLIBC_TUNABLES"
    if not sys.platform.startswith("linux") or "hugetlb" in os.environ.get(name, ""):
        return
    settings = [os.environ[name]] if os.environ.get(name) else []
    environment = {**os.environ, name: ":".join([*settings, "glibc.malloc.hugetlb=1"])}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _parse(allow_rest: bool, argv: Sequence[str]) -> Any:
    try:
        return flags.FLAGS(argv, known_only=allow_rest)
    except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
        # ml_collections raises an AttributeError of an unknown config key, with a traceback
        text = str(error).strip("'\"").replace("\\'", "'").replace("\\n", " ").replace("\n", " ")
        if isinstance(error, AttributeError):
            text = f"config has no key {text}"
        print(f"error: {text} (--help lists flags, --explain config keys)", file=sys.stderr)
        sys.exit(2)


def _start() -> None:
    """Turns the persistent compilation cache on, and libraries' chatter off.

    The cache lies in ~/.cache/lm unless JAX_COMPILATION_CACHE_DIR names another place.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax tells some thirty lines a save
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else TensorFlow tells us about it
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "lm", "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
