"""Files beside config.json of models of pictures, and the classes that config.json names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lm.config.tree import ConfigTree
from lm.hf.files import StoredTensor, read_json
from lm.hf.keys import Json, Say
from lm.tokenizers import tokenizer as tokenizers

FILE = "preprocessor_config.json"


def complete(
    config: ConfigTree, folder: Path, tree: Json, tensors: Mapping[str, StoredTensor], say: Say
) -> None:
    """Set what config.json doesn't say of a model of pictures: how pixels are scaled, the names of
    classes, the padding of texts, and that the factor on cosines has no limit where it is beyond.

    Raises:
        ValueError: preprocessor_config.json scales pixels otherwise, or to another size.
    """
    model = config.model
    model.update(_read_preprocessor(folder, model.image_size, say))
    if "num_classes" in model and model.has_head and "labels" in config.objective:
        names = [str(name) for _, name in sorted(_by_number(tree).items())]
        if len({*names}) == len(names) == model.num_classes:
            config.objective.labels = tuple(names)
    if "text" in model and model.text.pad_id is not None:
        model.text.pad_id = tokenizers.load(config.data.tokenizer).pad_id
    if model.get("max_logit_scale") is not None:
        scale = math.exp(float(tensors["logit_scale"].read().reshape(())))
        if scale > model.max_logit_scale * (1 + 1e-5):
            say(f"config.model.max_logit_scale: None, as the stored scale is {scale:.2f}")
            model.max_logit_scale = None


def _by_number(tree: Json) -> dict[int, object]:
    return {int(number): name for number, name in (tree.get("id2label") or {}).items()}


def names_of_classes(config: Any) -> Json:
    """The keys of config.json that name the classes that a run was trained to tell apart."""
    if not getattr(config.model, "has_head", False):
        return {}
    labels = getattr(config.objective, "labels", ())
    names = [*labels, *(f"LABEL_{i}" for i in range(len(labels), config.model.num_classes))]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _read_preprocessor(folder: Path, size: int, say: Say) -> dict[str, object]:
    """image_mean and image_std of a folder; nothing without its file."""
    path = folder / FILE
    if not path.exists():
        say(f"note: there is no {FILE}: pixels are scaled by config.model.image_mean and image_std")
        return {}
    tree = read_json(path)
    factor = tree.get("rescale_factor", 1 / 255)
    if tree.get("do_rescale", True) is not True or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"{path} has do_rescale and rescale_factor = {factor}: pixels are / 255")
    given = tree.get("crop_size") or tree.get("size") or size
    sizes = {*given.values()} if isinstance(given, dict) else {given}
    if sizes != {size}:
        raise ValueError(f"{path} has pictures of {given}, and config.json of {size}")
    if tree.get("do_normalize", True) is not True:
        return {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
    return {name: tuple(map(float, tree[name])) for name in ("image_mean", "image_std")}


def write_preprocessor(folder: Path, own: Callable[[int], Json], model: Any) -> None:
    """Write the file with which AutoImageProcessor makes the pixels that a model was trained on."""
    tree = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.image_mean),
        "image_std": list(model.image_std),
        "do_resize": True,
        **own(model.image_size),
    }
    (folder / FILE).write_text(json.dumps(tree, indent=2))
