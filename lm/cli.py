"""Start and end of a script: settings that must precede JAX, flags, and errors as one line."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.util
import logging as stdlib_logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lm.config import command_line
from lm.config.suggestions import suggestion
from lm.exit_codes import Exit, RunError
from lm.parallel import process_group
from lm.storage.filesystems import StorageError
from lm.storage.paths import expand_local_path, expand_path

T = TypeVar("T")
USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    PermissionError,
    FloatingPointError,
)


class ArgumentParser(argparse.ArgumentParser):
    """The parser of scripts: errors are one line, underscores are dashes, and a config's keys are
    flags after `add_config`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        self._takes_config = self._reads_config = False

    def add_config(
        self,
        default: str | None = None,
        help: str = "a file with get_config(arg), as FILE or FILE:ARG, or a run's config.json",
        *,
        read: bool = True,
    ) -> None:
        """Add --config=FILE and --config.KEY=VALUE: `parse_args` returns the locked `ConfigTree` as
        `config`, the name of its file as `config_name`, and every KEY=VALUE in `settings`.

        read: False leaves the file's name in `config`, for scripts that make a config of each run.
        """
        self.add_argument("--config", metavar="FILE", default=default, help=help)
        self._takes_config, self._reads_config = True, read

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        words, settings = list(sys.argv[1:] if args is None else args), []
        if self._takes_config:
            words, settings = command_line.split(words)
        found, rest = self.parse_known_args(with_dashes(words), namespace or argparse.Namespace())
        if rest:
            flag = rest[0].partition("=")[0]
            section, dot, key = flag.lstrip("-").partition(".")
            if not self._takes_config or not dot:
                hint = suggestion(flag, self._option_string_actions)
            elif suggestion(section, ["config"]):  # --confg.train.num_steps
                hint = f"; did you mean --config.{key}?"
            else:
                hint = f"; did you mean --config.{section}.{key}?"
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        if not self._takes_config:
            return found
        if found.config is None:
            changes = f"--config.{settings[0]} changes a config: " if settings else ""
            self.error(f"{changes}--config=configs/NAME.py is needed")
        found.config_name, found.settings = found.config, settings
        if self._reads_config:
            try:
                found.config = command_line.read(found.config, settings)
            except ValueError as error:
                self.error(str(error).replace("\n", " "))
        return found

    def error(self, message: str) -> NoReturn:
        keys = ", train.py --explain config keys" if self._takes_config else ""
        self.exit(Exit.USAGE, f"error: {message} (--help lists flags{keys})\n")


def with_dashes(argv: Sequence[str]) -> list[str]:
    """Spell flags with dashes up to a bare `--`: --num_beams is --num-beams.

    Config keys, as in --config.train.num_steps, stay.
    """
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    for i, word in enumerate(words[:end]):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and "." not in flag:
            words[i] = flag.replace("_", "-") + equals + value
    return words


def run(main: Callable[[], int]) -> None:
    """End the process with the exit code of `main`, or of the error in it."""
    _use_huge_pages()
    _leave_scripts_off_the_path()
    _set_up()
    code, message = _outcome(main)
    if message:
        print(message, file=sys.stderr)
    sys.exit(process_group.leave(code, message))


def _outcome(main: Callable[[], int]) -> tuple[int, str]:
    """(exit code, message) of `main`; a mistake of the user is one line."""
    try:
        with process_group.peer_errors():
            return main(), ""
    except RunError as error:
        return error.code, f"error: {error}"
    except StorageError as error:
        return Exit.NO_STORAGE, f"error: {error}"
    except USER_ERRORS as error:
        return Exit.ERROR, f"error: {error}"
    except ModuleNotFoundError as error:
        name = error.name or ""
        if "." in name or name in ("", "lm", "scripts", "configs"):
            raise
        return Exit.ERROR, f"error: {name} is needed here and not installed: pip install {name}"
    except (MemoryError, RuntimeError) as error:
        from lm.parallel import device_errors  # which imports jax

        code = device_errors.exit_code(error)
        if code is None:
            raise
        traceback.print_exc()  # where it came up, for whoever has to find the cause
        return code, f"error: {device_errors.describe(code, error)}"
    except BrokenPipeError:  # whoever read the output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE, ""
    except KeyboardInterrupt:  # training itself saves first: see lm/reliability/stop_signals.py
        return Exit.INTERRUPTED, "\ninterrupted; the same command goes on"


@contextlib.contextmanager
def named_by_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """Name in errors the flag that the user gave, in place of the config path that it sets.

    flags: {"config.data.validation": "--data", ...}, those that were given.
    """
    try:
        yield
    except ValueError as error:
        text = str(error)
        for path, flag in flags.items():
            text = re.sub(rf"(config\.)?\b{re.escape(path.removeprefix('config.'))}\b", flag, text)
        if text == str(error):
            raise
        raise ValueError(text) from error


def folder(path: str) -> str:
    """A flag's path of a run's folder, with `~` expanded; its type in argparse. Raises
    argparse.ArgumentTypeError where no folder can have this name, or something else has it.
    """
    if not path.strip():
        raise argparse.ArgumentTypeError(f"{path!r} is no name of a folder")
    if "://" in (path := file(path)):
        return path
    try:
        path.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(
            f"{os.fsencode(path)!r} is not UTF-8, and config.json of a run holds names: rename it"
        ) from None
    found = Path(path)
    for part in (found, *found.parents):
        if part.is_symlink() and not part.exists():
            raise argparse.ArgumentTypeError(f"{part} is a link to {part.readlink()}: not there")
        if part.exists() and not part.is_dir():
            raise argparse.ArgumentTypeError(f"{part} is a file, not a folder")
    return str(found)


def file(path: str) -> str:
    """A flag's path of a file, here or in a bucket, with `~` expanded; its type in argparse. Raises
    argparse.ArgumentTypeError.
    """
    return _path(expand_path, path)


def local_path(path: str) -> str:
    """As `file`, of a file or folder that is written on this machine alone."""
    return _path(expand_local_path, path)


def _path(expand: Callable[[str, str], str], path: str) -> str:
    try:
        return expand(path, "")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from None


def list_of(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """The type in argparse of a flag such as 64,128, each of whose entries `kind` reads."""

    def entries(text: str) -> list[T]:
        return [kind(entry) for entry in text.split(",")]

    return entries


def _use_huge_pages() -> None:
    """Start this program again with glibc's huge pages, unless it has them.

    XLA's CPU client takes fresh memory for the temporaries of every step. Mapping it in pages of
    4 KiB nearly halves the speed of training on a CPU, and glibc reads its settings only when a
    process starts. Without glibc this changes nothing.
    """
    name = "GLIBC_TUNABLES"
    if not sys.platform.startswith("linux") or "hugetlb" in os.environ.get(name, ""):
        return
    settings = [os.environ[name]] if os.environ.get(name) else []
    environment = {**os.environ, name: ":".join([*settings, "glibc.malloc.hugetlb=1"])}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _leave_scripts_off_the_path() -> None:
    """Python puts the folder of a script on its path, and scripts/lm_eval.py and evaluate.py would
    hide the packages of their names.
    """
    scripts = Path(__file__).resolve().parent.parent / "scripts"
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != scripts]


def _report(unraisable: sys.UnraisableHookArgs) -> None:
    """sys.unraisablehook, but for TensorStore's threads: after the first write that fails Orbax
    closes the event loop that the others report to, and each would print a stack about that.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def skip_absent_tpu() -> None:
    """Keep jax from looking for a TPU where libtpu is installed for its compiler alone: it would
    ask a metadata server that isn't there, and fill the screen.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    import jax
    from jax._src import hardware_utils

    if hardware_utils.num_available_tpu_chips_and_device_id()[0] == 0:
        gpu = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
        platforms = "cuda,cpu" if gpu else "cpu"
        os.environ["JAX_PLATFORMS"] = platforms  # for processes that this one starts
        jax.config.update("jax_platforms", platforms)  # jax has read its environment by now


def with_host(platforms: str | None) -> str | None:
    """JAX_PLATFORMS with the host, which computes checksums; None stands for all platforms."""
    return f"{platforms},cpu" if platforms and "cpu" not in platforms.split(",") else platforms


class _OneLine(stdlib_logging.Formatter):
    """Warnings and errors that libraries log, one line each, without tracebacks."""

    def format(self, record: stdlib_logging.LogRecord) -> str:
        return f"{record.name}: {record.getMessage().partition(chr(10))[0]}"


def _set_up() -> None:
    """Turn the persistent compilation cache on, and libraries' log lines off.

    The cache lies in ~/.cache/lm unless JAX_COMPILATION_CACHE_DIR names another place.
    """
    skip_absent_tpu()
    import jax
    from absl import logging

    jax.config.update("jax_platforms", with_host(jax.config.values["jax_platforms"]))

    faulthandler.enable()
    sys.unraisablehook = _report
    logging.set_verbosity(logging.WARNING)  # Orbax logs some thirty lines a save
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(_OneLine())
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else TensorFlow tells us about it
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "lm", "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
