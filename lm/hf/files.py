"""Files of tensors: safetensors, or PyTorch's `.bin`, one or several with an index."""

from __future__ import annotations

import functools
import json
import math
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from lm.hf.keys import Json
from lm.hf.table import Shape, shortened

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


def read_json(file: Path) -> Json:
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


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    name: str
    file: Path
    shape: Shape
    dtype: str  # a key of `DTYPES`, or another one
    read: Callable[[], np.ndarray]  # in that type, one of `DTYPES`


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder by name, each read when it is asked for.

    Raises:
        FileNotFoundError: there are no files of tensors.
        ValueError: a file is none of its kind, or a name is in two files.
    """
    kind, files = _find(folder)
    found: dict[str, StoredTensor] = {}
    for file in files:
        check_pointer(file)
        for tensor in _in_safetensors(file) if kind == "safetensors" else _in_bin(file):
            if other := found.get(tensor.name):
                raise ValueError(f"{tensor.name} is both in {other.file.name} and in {file.name}")
            found[tensor.name] = tensor
    return found


def _in_safetensors(file: Path) -> Iterator[StoredTensor]:
    from safetensors import SafetensorError, safe_open

    def read(name: str) -> np.ndarray:
        # opened for each tensor: what was read of a mapped file counts as memory until it is closed
        with safe_open(file, "np") as tensors:
            return tensors.get_tensor(name)

    try:
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                shape, read_it = tuple(part.get_shape()), functools.partial(read, name)
                yield StoredTensor(name, file, shape, part.get_dtype(), read_it)
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}") from error


def _in_bin(file: Path) -> Iterator[StoredTensor]:
    try:
        import torch
    except ImportError:
        raise ValueError(f"{file} needs PyTorch: pip install torch, or use safetensors") from None

    def read(tensor: torch.Tensor) -> np.ndarray:
        tensor = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    codes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    try:  # mapped: a tensor's pages are read when it is
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} is no file of tensors by torch.save: {reason}") from error
    for name, tensor in tensors.items():
        dtype = codes.get(tensor.dtype, str(tensor.dtype))
        yield StoredTensor(name, file, tuple(tensor.shape), dtype, functools.partial(read, tensor))


def check_dtypes(tensors: Iterable[StoredTensor]) -> None:
    """Raise ValueError, listing them, where tensors are no floats of 16 or 32 bits."""
    if wrong := [f"{x.name} ({x.dtype})" for x in tensors if x.dtype not in DTYPES]:
        raise ValueError(
            f"tensors must be of the types {', '.join(DTYPES)}, and of others are "
            f"{shortened(wrong)}"
        )


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


def write_tensors(
    folder: Path,
    shapes: Mapping[str, Shape],
    make: Callable[[str], np.ndarray],
    dtype: str,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the tensors `make(name)`, floats cast, as safetensors, with an index of several files.

    One file's tensors are in memory at a time.
    """
    from safetensors.numpy import save_file

    itemsize = np.dtype(dtype).itemsize
    sizes = {name: math.prod(shape) * itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = {}
    for i, names in enumerate(shards, start=1):
        number = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        files |= dict.fromkeys(names, file := f"model{number}.safetensors")
        arrays = {name: make(name) for name in names}
        kinds = {name: x.dtype if x.dtype.kind == "i" else dtype for name, x in arrays.items()}
        tensors = {name: np.asarray(x, kinds[name], order="C") for name, x in arrays.items()}
        save_file(tensors, folder / file, {"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
