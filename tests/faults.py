"""Faults of files and storage, for tests to inject."""

from __future__ import annotations

import contextlib
import pathlib
import subprocess
from collections.abc import Iterator

import pytest


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files below a folder, in one order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_bit(path: pathlib.Path, bit: int) -> None:
    """Inverts one bit of a file: what a bad disk, cable or memory does."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def truncate(path: pathlib.Path, size: int) -> None:
    """Keeps the first `size` bytes of a file: what a power cut leaves of one that wasn't synced."""
    with path.open("r+b") as file:
        file.truncate(size)


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, megabytes: int) -> Iterator[pathlib.Path]:
    """`folder` as a disk of its own with so much space; skips the test where mounting is not
    permitted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def read_only(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """`folder` where nothing can be written, not even by root, whom permissions don't stop."""
    _mount("--bind", str(folder), str(folder))
    try:
        _mount("-o", "remount,bind,ro", str(folder))
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
