"""Export of a run to a folder in Hugging Face's layout: config.json, safetensors, tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from lm.compression.quantized_weights import WeightFormat, dequantize_params, quantize_params
from lm.hf import folding, packed_weights, pictures, structure, table, vocabulary
from lm.hf.files import SHARD_BYTES, write_tensors
from lm.hf.keys import Say
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
    weights: WeightFormat | None = None,
    say: Say = print,
) -> str:
    """Write parameters as a folder that `transformers` loads, and return the family.

    family: a `model_type`; None: the first, by name, that can represent the model. weights: of the
    matrices inside the layers, as `lm.hf.packed_weights`.

    Raises:
        ValueError: `out` is not empty, the run has adapters, the family can't represent the model,
        or a finite entry is too large for the type.
    """
    if rank := getattr(experiment.config.model, "lora", lora.LoraConfig()).rank:
        raise ValueError(
            f"config.model.lora.rank is {rank}: adapters are of no family; merge them into their "
            "base by scripts/merge_lora.py --workdir=RUN --out=MERGED, and export MERGED"
        )
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{out} is not empty; export into a new folder")
    model, quantized = experiment.config.model, {}
    if weights is not None:
        boxed, rules = experiment.boxed_params, experiment.param_rules
        small = quantize_params(params, boxed, rules, weights)
        quantized = packed_weights.in_layers(small)
        params = dequantize_params(small)
    section, leaves = folding.fold(experiment.config_dict.model, model, param_tree.flatten(params))
    name = family or structure.find_family(section)
    kind = structure.family(name)
    tree = structure.hf_config(kind, section)
    if kind.reads_text:
        is_pair = model.takes_encoder
        ids = vocabulary.special_ids(experiment.tokenizer, is_encoder_decoder=is_pair)
        if name == "clip" and ids.get("eos_token_id") == 2:
            raise ValueError(
                "CLIPModel with eos_token_id = 2 takes the largest id of a text for its end (as of "
                f"old releases), and {experiment.tokenizer.name} has eos there"
            )
        of_text = tree.get("text_config", tree)
        of_text |= ids
    parameters = {name: leaf.shape for name, leaf in leaves.items()}
    layout = {"transposed": kind.transposed, "ones": kind.ones}
    slices = table.parameter_slices(kind.modules(model), parameters, **layout)
    bare = "" if getattr(model, "has_head", True) else kind.prefix  # as that class names them
    tensors = {n.removeprefix(bare): parts for n, parts in table.by_tensor(slices).items()}
    shapes = {name: table.tensor_shape(parts) for name, parts in tensors.items()}
    packed: dict[str, np.ndarray] = {}
    if weights is not None:
        packed_weights.check(weights, quantized, model, kind.transposed, dtype)
        for tensor in [t for t, parts in tensors.items() if parts[0].parameter in quantized]:
            packed |= packed_weights.packed_tensors(tensor, tensors.pop(tensor), quantized)
            del shapes[tensor]
        tree["quantization_config"] = packed_weights.quantization_config(weights, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    if kind.reads_text:
        vocabulary.export(experiment.tokenizer, folder, max_length=model.max_length)
    if kind.image_processor is not None:
        pictures.write_preprocessor(folder, kind.image_processor, model)
        tree |= pictures.names_of_classes(experiment.config)

    def make(name: str) -> np.ndarray:
        if name in packed:
            return packed[name]
        x = table.join(tensors[name], leaves)
        largest = float(np.max(np.abs(x), initial=0.0, where=np.isfinite(x)))
        if dtype == "float16" and largest > float(np.finfo(np.float16).max):
            raise ValueError(f"{name} has an entry of size {largest:g}, too large for float16")
        return x

    whole = shapes | {name: x.shape for name, x in packed.items()}
    write_tensors(folder, whole, make, dtype, shard_bytes=shard_bytes)
    text = json.dumps(tree | {"dtype": dtype, "torch_dtype": dtype}, indent=2)
    (folder / "config.json").write_text(text)
    count = sum(map(math.prod, parameters.values()))
    say(f"{len(whole)} tensors of {count:,} parameters, as {name}")
    return name
