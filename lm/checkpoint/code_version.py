"""Version of the code that wrote a checkpoint."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import pathlib
import platform
import subprocess

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@functools.cache
def code_version() -> dict[str, str | bool | None]:
    """Identify this code: a hash of lm's files, git's commit where there is one, and versions."""
    package = pathlib.Path(__file__).parents[1]
    source = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source.update(f"{path.relative_to(package).as_posix()}\0".encode())
        source.update(hashlib.sha256(path.read_bytes()).digest())
    # an installed package may lie inside of a repository that isn't its own
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None
    changed = _git(package, "status", "--porcelain", "--untracked-files=no") if tracked else None
    return {
        "source": source.hexdigest(),
        "commit": _git(package, "rev-parse", "HEAD") if tracked else None,
        "dirty": None if changed is None else bool(changed),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _git(folder: pathlib.Path, *arguments: str) -> str | None:
    """The output of a git command; None where git or the repository is missing, or it fails."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        output = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return output.strip()
