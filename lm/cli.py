"""Start and end of a script: settings that must precede JAX, flags, and errors as one line."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import logging as stdlib_logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app

from lm.config import command_line
from lm.config.command_line import ConfigFlag
from lm.exit_codes import Exit, RunError
from lm.parallel import process_group

USER_ERRORS = (ValueError, FileNotFoundError, PermissionError, FloatingPointError)


class ArgumentParser(argparse.ArgumentParser):
    """The parser of scripts that take no config: errors are one line, underscores are dashes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore
        args = with_dashes(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(Exit.USAGE, f"error: {message} (--help lists flags)\n")


def with_dashes(argv: Sequence[str], known: Container[str] = ()) -> list[str]:
    """Spell flags with dashes up to a bare `--`: --num_beams is --num-beams.

    Config keys, as in --config.train.num_steps, stay, and so do the names in `known`.
    """
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    for i, word in enumerate(words[:end]):
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--")
        if flag == name or "." in name or name in known or name.removeprefix("no") in known:
            continue
        words[i] = flag.replace("_", "-") + equals + value
    return words


def run(main: Callable[..., int], *args: Any) -> None:
    """End the process with the exit code of `main(*args)`, or of the error in it."""
    _use_huge_pages()
    _set_up()
    code, message = _outcome(main, *args)
    if message:
        print(message, file=sys.stderr)
    sys.exit(process_group.leave(code, message))


def _outcome(main: Callable[..., int], *args: Any) -> tuple[int, str]:
    """(exit code, message) of `main(*args)`; a mistake of the user is one line."""
    try:
        with process_group.peer_errors():
            return main(*args), ""
    except RunError as error:
        return error.code, f"error: {error}"
    except app.UsageError as error:
        return Exit.USAGE, f"error: {error} (--help lists flags)"
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


def run_with_config(
    main: Callable[[Sequence[str]], int],
    config: ConfigFlag | None = None,
    *,
    allow_rest: bool = False,
) -> None:
    """`run` for scripts whose flags are absl's, --config among them where `config` is that flag.

    `main` gets the arguments that are no flags; without `allow_rest` there may be none.
    """
    _use_huge_pages()
    parse = functools.partial(_parse, config=config, allow_rest=allow_rest)
    app.run(functools.partial(run, main), flags_parser=parse)


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
    if "://" in path:
        return path
    try:
        path.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(
            f"{os.fsencode(path)!r} is not UTF-8, and config.json of a run holds names: rename it"
        ) from None
    if not path.strip():
        raise argparse.ArgumentTypeError(f"{path!r} is no name of a folder")
    found = Path(os.path.expanduser(path))
    for part in (found, *found.parents):
        if part.is_symlink() and not part.exists():
            raise argparse.ArgumentTypeError(f"{part} is a link to {part.readlink()}: not there")
        if part.exists() and not part.is_dir():
            raise argparse.ArgumentTypeError(f"{part} is a file, not a folder")
    return str(found)


def define_workdir(sentence: str) -> Any:
    """The flag --workdir of scripts whose flags are absl's: a holder of `folder` of its value."""
    from absl import flags

    class Parser(flags.ArgumentParser):
        def parse(self, argument: str) -> str:
            try:
                return folder(argument)
            except argparse.ArgumentTypeError as error:
                raise ValueError(str(error)) from None

    return flags.DEFINE(Parser(), "workdir", None, sentence)


def _parse(argv: Sequence[str], config: ConfigFlag | None, allow_rest: bool) -> Sequence[str]:
    from absl import flags

    try:
        argv = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
        argv, settings = command_line.split(argv) if config else (argv, [])
        argv = with_dashes(argv, flags.FLAGS)
        rest = flags.FLAGS(argv, known_only=allow_rest)
        if config is not None:
            config.load(settings)
    except (ValueError, flags.Error) as error:
        text = str(error).replace("\n", " ")
        if isinstance(error, flags.UnrecognizedFlagError) and "." in error.flagname:
            text = f"{text.split('. Did')[0]}; did you mean --config.{error.flagname}?"
        print(f"error: {text} (--help lists flags, --explain config keys)", file=sys.stderr)
        sys.exit(2)
    if len(rest) > 1 and not allow_rest:
        print(f"error: unexpected arguments: {' '.join(rest[1:])}", file=sys.stderr)
        sys.exit(2)
    return rest


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


def _report(unraisable: Any) -> None:
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
