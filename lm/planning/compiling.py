"""One compilation with all its outputs: the program, its buffers, and the compiler's messages."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.planning import protos
from lm.telemetry.progress import Progress

if TYPE_CHECKING:
    import jax

FIELDS = ("argument", "output", "alias", "temp", "generated_code")  # of memory_analysis()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program. One that does not fit has buffers, but no `sizes`."""

    program: Any  # HloProto: the optimized module and the assignment of its buffers
    sizes: dict[str, int]  # bytes by field of memory_analysis()
    host_sizes: dict[str, int]  # the same for memory of the host
    peak: int | None  # bytes in use at once, by memory_analysis()
    refusal: str  # the compiler's words where the program doesn't fit
    available: int | None  # bytes of memory that the refusal speaks of
    messages: tuple[str, ...]  # what the compiler wrote while it ran
    seconds: float
    cpu_seconds: float  # of all threads, which other work on the machine lengthens less


def compile_step(
    lowered: jax.stages.Lowered, *, label: str = "", show: Progress | None = None
) -> Compiled:
    """Compile a lowered step; `show` draws the time so far.

    Raises:
        ValueError: the compiler refuses the program for another reason than memory.
    """
    import jax

    start, busy = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="lm-plan-") as folder, _captured_stderr() as messages:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_proto": True}
        sizes, host, peak, refusal = {}, {}, None, ""
        cache = bool(jax.config.values["jax_enable_compilation_cache"])
        _use_cache(False)  # a program from the cache of compilations comes without its dump
        try:
            with _ticking(label, start, show):
                stats = lowered.compile(compiler_options=options).memory_analysis()
            assert stats is not None, "every compiler that plans use has an analysis"
            sizes = {n: int(getattr(stats, f"{n}_size_in_bytes")) for n in FIELDS}
            host = {n: int(getattr(stats, f"host_{n}_size_in_bytes")) for n in FIELDS}
            peak = int(stats.peak_memory_in_bytes)
        except jax.errors.JaxRuntimeError as error:
            refusal = str(error)
            if "RESOURCE_EXHAUSTED" not in refusal:
                raise ValueError(f"the compiler refuses this program: {refusal}") from None
        finally:
            _use_cache(cache)
        seconds, cpu_seconds = time.monotonic() - start, time.process_time() - busy
        program = protos.message("HloProto").FromString(_dumped(folder))
        written = messages()
    if not program.buffer_assignment.buffer_allocations:
        raise ValueError(f"the compiler left no program to look at: {refusal or 'no dump'}")
    return Compiled(
        program,
        sizes,
        host,
        peak,
        refusal,
        _available(refusal),
        tuple(written),
        seconds,
        cpu_seconds,
    )


def _use_cache(wanted: bool) -> None:
    """Turn jax's persistent cache on or off. It reads its setting once, until it is reset."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", wanted)
    compilation_cache.reset_cache()


def _dumped(folder: str) -> bytes:
    """The largest program: the step, beside which small ones may be compiled."""
    found = Path(folder).glob("*after_optimizations.hlo.pb")
    return max((path.read_bytes() for path in found), key=len, default=b"")


def _available(refusal: str) -> int | None:
    """Bytes of HBM that a program may use, from "exceeds available HBM (15.75G)" or "of 15.75G"."""
    found = re.search(r"(?:available HBM \(|of )([\d.]+)([KMGT])", refusal)
    scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return int(float(found[1]) * scale[found[2]]) if found else None


@contextlib.contextmanager
def _captured_stderr() -> Iterator[Callable[[], list[str]]]:
    """Capture file descriptor 2, to which libraries write; yield a function that returns the lines
    so far.
    """
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as taken:
        os.dup2(taken.fileno(), 2)

        def lines() -> list[str]:
            taken.seek(0)
            return taken.read().decode(errors="replace").splitlines()

        try:
            yield lines
        finally:
            os.dup2(original, 2)
            os.close(original)


@contextlib.contextmanager
def _ticking(label: str, start: float, show: Progress | None) -> Iterator[None]:
    """Draw the time so far every second."""
    if show is None:
        yield
        return
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(1.0):
            show.show(f"{label}: compiling, {time.monotonic() - start:.0f} s")

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        show.clear()
