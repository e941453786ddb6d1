"""Files of tensors: safetensors, or PyTorch's `.bin`, one or several with an index."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from lm.hf.table import Shape, shortened

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 5_000_000_000
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
STEMS = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}


def check_pointer(file: Path) -> None:
    """Raise ValueError where a file is the pointer that Git keeps to a file of Git LFS."""
    with open(file, "rb") as content:
        head = content.read(512)
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        size = re.search(rb"^size (\d+)$", head, re.MULTILINE)
        of_size = f" of a file of {int(size[1]):,} bytes" if size else ""
        raise ValueError(
            f"{file} is a Git LFS pointer{of_size}, not the file itself: get it by `git lfs pull` "
            f"in {file.parent}"
        )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it is no JSON, or no object; the message names the file.
    """
    check_pointer(file)
    try:
        tree = json.loads(file.read_bytes())
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file} must hold an object, and holds a {type(tree).__name__}")
    return tree


class Reader:
    """The tensors of a folder, one at a time."""

    def __init__(self, folder: Path) -> None:
        """Raise FileNotFoundError unless there are files of tensors."""
        self.folder = folder
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        self._loaded: dict[str, Tensor] = {}
        kind, files = _find(folder)
        for file in files:
            check_pointer(file)
            self._open_safetensors(file) if kind == "safetensors" else self._open_bin(file)

    def _add(self, name: str, file: Path, shape: Shape, dtype: str) -> None:
        if name in self._files:
            raise ValueError(f"{name} is both in {self._files[name].name} and in {file.name}")
        self._files[name], self.shapes[name], self.dtypes[name] = file, shape, dtype

    def _open_safetensors(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "np") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(name)
                    self._add(name, file, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from error

    def _open_bin(self, file: Path) -> None:
        try:
            import torch
        except ImportError:
            raise ValueError(
                f"{file} needs PyTorch: pip install torch, or use safetensors"
            ) from None
        codes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        try:  # mapped: a tensor's pages are read when it is
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{file} is no file of tensors by torch.save: {reason}") from error
        for name, tensor in tensors.items():
            self._add(name, file, tuple(tensor.shape), codes.get(tensor.dtype, str(tensor.dtype)))
            self._loaded[name] = tensor

    @property
    def num_bytes(self) -> int:
        return sum(
            math.prod(shape) * DTYPES[self.dtypes[name]].itemsize
            for name, shape in self.shapes.items()
            if self.dtypes[name] in DTYPES
        )

    def check_dtypes(self, names: Iterable[str]) -> None:
        """Raise ValueError, listing them, where tensors are no floats of 16 or 32 bits."""
        wrong = [f"{n} ({self.dtypes[n]})" for n in names if self.dtypes[n] not in DTYPES]
        if wrong:
            raise ValueError(
                f"tensors must be of the types {', '.join(DTYPES)}, and of others are "
                f"{shortened(wrong)}"
            )

    def read(self, name: str) -> np.ndarray:
        """A tensor in the type that it has in the file, one that passes `check_dtypes`."""
        if name in self._loaded:
            return _from_torch(self._loaded[name])
        from safetensors import safe_open

        # opened for each tensor: what was read of a mapped file counts as memory until it is closed
        with safe_open(self._files[name], "np") as tensors:
            return tensors.get_tensor(name)


def _find(folder: Path) -> tuple[str, list[Path]]:
    """(kind, files) of a folder's tensors."""
    for kind, stem in STEMS.items():
        index = folder / f"{stem}.index.json"
        if index.exists():
            files = sorted(set(read_json(index)["weight_map"].values()))
            if missing := [file for file in files if not (folder / file).exists()]:
                raise FileNotFoundError(
                    f"{folder} lacks {', '.join(missing)}, which {index.name} names"
                )
            return kind, [folder / file for file in files]
        if (folder / stem).exists():
            return kind, [folder / stem]
    raise FileNotFoundError(
        f"{folder} has no tensors: none of "
        + ", ".join(f"{stem}, {stem}.index.json" for stem in STEMS.values())
    )


def _from_torch(tensor: Tensor) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def write_tensors(
    folder: Path,
    shapes: Mapping[str, Shape],
    make: Callable[[str], np.ndarray],
    dtype: str,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the tensors `make(name)` as safetensors, with an index where there are several files.

    One file's tensors are in memory at a time.
    """
    from safetensors.numpy import save_file

    itemsize = np.dtype(dtype).itemsize
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        length = math.prod(shape) * itemsize
        if filled and filled + length > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += length
    files = {}
    for i, names in enumerate(shards, start=1):
        number = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        files |= dict.fromkeys(names, file := f"model{number}.safetensors")
        tensors = {name: np.ascontiguousarray(make(name), dtype) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
    if len(shards) > 1:
        total = sum(map(math.prod, shapes.values())) * itemsize
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
