"""One compilation with all its outputs: the program, its buffers, and the compiler's messages."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import IO

import jax
from jax.experimental.compilation_cache import compilation_cache

from lm.compiled import protos
from lm.compiled.protos import Proto
from lm.telemetry.progress import Progress


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program. One that does not fit has buffers, but no `stats`."""

    program: Proto  # HloProto: the optimized module and the assignment of its buffers
    stats: object | None  # of memory_analysis()
    refusal: str  # the compiler's words where the program doesn't fit
    messages: tuple[str, ...]  # what the compiler wrote while it ran
    seconds: float
    cpu_seconds: float  # of all threads, which other work on the machine lengthens less

    def size(self, name: str) -> int:
        """Bytes by the name in memory_analysis() less its `_in_bytes`; 0 where it doesn't fit."""
        return 0 if self.stats is None else int(getattr(self.stats, f"{name}_in_bytes"))

    @property
    def available(self) -> int | None:
        """Bytes of HBM that the refusal names, as "exceeds available HBM (15.75G)", "of 15.75G"."""
        found = re.search(r"(?:available HBM \(|of )([\d.]+)([KMGT])", self.refusal)
        scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        return int(float(found[1]) * scale[found[2]]) if found else None


def compile_step(
    lowered: jax.stages.Lowered, *, label: str = "", show: Progress | None = None
) -> Compiled:
    """Compile a lowered step; `show` draws the time so far.

    Raises:
        ValueError: the compiler refuses the program for another reason than memory.
    """
    start, busy = time.monotonic(), time.process_time()
    stats, refusal = None, ""
    with tempfile.TemporaryDirectory(prefix="lm-plan-") as folder, _captured_stderr() as stderr:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_proto": True}
        with _without_cache(), futures.ThreadPoolExecutor(1) as pool:
            compiling = pool.submit(lowered.compile, compiler_options=options)
            while show is not None and not futures.wait([compiling], timeout=1.0).done:
                show.show(f"{label}: compiling, {time.monotonic() - start:.0f} s")
        if show is not None:
            show.clear()
        try:
            stats = compiling.result().memory_analysis()
            assert stats is not None, "every compiler that plans use has an analysis"
        except jax.errors.JaxRuntimeError as error:
            refusal = str(error)
            if "RESOURCE_EXHAUSTED" not in refusal:
                raise ValueError(f"the compiler refuses this program: {refusal}") from None
        seconds, cpu_seconds = time.monotonic() - start, time.process_time() - busy
        # the largest is the step, beside which small programs may be compiled
        dumps = [path.read_bytes() for path in Path(folder).glob("*after_optimizations.hlo.pb")]
        stderr.seek(0)
        messages = tuple(stderr.read().decode(errors="replace").splitlines())
    program = protos.message("HloProto").FromString(max(dumps, key=len, default=b""))
    if not program.buffer_assignment.buffer_allocations:
        raise ValueError(f"the compiler left no program to look at: {refusal or 'no dump'}")
    return Compiled(program, stats, refusal, messages, seconds, cpu_seconds)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Turn jax's persistent cache of compilations off: a program from it comes without its dump.
    jax reads the setting once, until it is reset.
    """
    was_enabled = bool(jax.config.values["jax_enable_compilation_cache"])
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was_enabled)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _captured_stderr() -> Iterator[IO[bytes]]:
    """A file in place of file descriptor 2, to which libraries write."""
    sys.stderr.flush()
    original = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            yield file
    finally:
        os.dup2(original, 2)
        os.close(original)
