"""From a run's folder to one in Hugging Face's layout: config.json, safetensors, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm.hf import folding, structure, table, vocabulary
from lm.hf.files import SHARD_BYTES, Writer
from lm.layers import lora
from lm.optim import param_tree
from lm.training.experiment import Experiment
from lm.types import Params


def export_folder(
    experiment: Experiment,
    params: Params,
    out: str,
    *,
    family: str | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], Any] = print,
) -> str:
    """Writes parameters as a folder that `transformers` loads, and returns the family.

    family: a `model_type`; None: the first, by name, that can represent the model.

    Raises:
        ValueError: `out` has such files, the run has adapters, or the model is not one of the
        family.
    """
    if rank := getattr(experiment.config.model, "lora", lora.LoraConfig()).rank:
        raise ValueError(
            f"config.model.lora.rank is {rank}: adapters are of no family; merge them into their "
            "base by scripts/merge_lora.py --workdir=RUN --out=MERGED, and export MERGED"
        )
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{out} is not empty; export into a new folder")
    model = experiment.config.model
    section: Any
    section, leaves = folding.fold(experiment.config_dict.model, model, param_tree.flatten(params))
    name = family or structure.find_family(section)
    kind = structure.family(name)
    tree = structure.hf_config(kind, section)
    ids = vocabulary.special_ids(experiment.tokenizer, is_encoder_decoder=model.takes_encoder)
    where = table.places(
        kind.weight_map(model), {name: leaf.shape for name, leaf in leaves.items()}
    )
    held = table.tensors(where)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary.export(experiment.tokenizer, folder, max_length=model.max_length)
    bare = "" if getattr(model, "has_head", True) else kind.PREFIX  # as that class names them
    held = {name.removeprefix(bare): parts for name, parts in held.items()}
    shapes = {name: table.tensor_shape(parts) for name, parts in held.items()}
    writer = Writer(folder, shapes, dtype, shard_bytes=shard_bytes)
    for tensor, parts in held.items():
        pieces = [_piece(leaves[place.row.parameter], place) for place in parts]
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)
        writer.write(tensor, _cast(whole, dtype, tensor))
    text = json.dumps(tree | ids | {"dtype": dtype, "torch_dtype": dtype}, indent=2)
    (folder / "config.json").write_text(text)
    say(
        f"{len(held)} tensors of {sum(np.prod(s) for s in shapes.values()):,} parameters, as {name}"
    )
    return name


def _piece(leaf: jax.Array, place: table.Place) -> np.ndarray:
    return place.row.layout.to_tensor(np.asarray(leaf[place.index]))


def _cast(x: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """x in another type.

    Raises:
        ValueError: a finite value is too large for it.
    """
    if dtype == "float16":
        largest = float(np.max(np.abs(x), initial=0.0))
        if np.isfinite(largest) and largest > np.finfo(np.float16).max:
            raise ValueError(f"{name} has an entry of size {largest:g}, too large for float16")
    return x.astype(np.dtype(dtype))
