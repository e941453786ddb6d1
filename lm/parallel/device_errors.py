"""Exit codes for errors of the machine, as opposed to the program, that JAX's runtime raises."""

from __future__ import annotations

import jax

from lm.exit_codes import Exit, RunError

# Errors of the program on any device: a restart changes nothing, and the traceback locates them.
PROGRAM_ERRORS = ("INVALID_ARGUMENT", "UNIMPLEMENTED")
NO_MEMORY = ("resource_exhausted", "out of memory", "out_of_memory")
ADVICE = {
    Exit.OUT_OF_MEMORY: (
        "Lower config.data.batch_size or data.length, raise config.train.num_microbatches, set "
        "config.model.remat, or use more devices; `lm plan` says what fits"
    ),
    Exit.DEVICE_ERROR: "The same command resumes from the last checkpoint",
}
KINDS = {Exit.OUT_OF_MEMORY: "out of memory", Exit.DEVICE_ERROR: "a device failed"}


def exit_code(error: BaseException) -> Exit | None:
    """OUT_OF_MEMORY (of a device or of the host) or DEVICE_ERROR; None for any other error."""
    if isinstance(error, MemoryError):
        return Exit.OUT_OF_MEMORY
    text = str(error)
    if not isinstance(error, jax.errors.JaxRuntimeError) or text.startswith(PROGRAM_ERRORS):
        return None
    lacks = any(words in text.lower() for words in NO_MEMORY)
    return Exit.OUT_OF_MEMORY if lacks else Exit.DEVICE_ERROR


def code_of(error: BaseException) -> int:
    """The exit code of a run that ends with this error."""
    if isinstance(error, RunError):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return Exit.INTERRUPTED
    return exit_code(error) or Exit.ERROR


def describe(code: Exit, error: BaseException) -> str:
    """One line for the user about an error with this exit code; notes of the error (PEP 678) of one
    line, which JAX's own are not, replace the usual advice.
    """
    text = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    notes = [note for note in getattr(error, "__notes__", ()) if "\n" not in note]
    advice = " ".join(notes) or ADVICE[code]
    return f"{KINDS[code]}: {text}. {advice}"
