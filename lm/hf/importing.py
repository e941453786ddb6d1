"""Import of a folder in Hugging Face's layout as a run: config, tokenizer, and a checkpoint of step
0 that holds only parameters.

Tensors are read, transposed and written one at a time. The run is like any other: it generates, is
evaluated, exported, and trained on with a new optimizer state.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lm.checkpoint.streamed import ParamsWriter
from lm.config import conversion
from lm.config.tree import ConfigTree, leaves
from lm.hf import pictures, structure, table, vocabulary
from lm.hf.family import Family
from lm.hf.files import StoredTensor, check_dtypes, open_tensors, read_json
from lm.hf.keys import Say
from lm.hf.table import Shape
from lm.optim import param_tree
from lm.reliability.data_ledger import start_totals
from lm.storage.epaths import StoragePath
from lm.tokenizers.run_tokenizer import FOLDER
from lm.training.experiment import CONFIG_FILE, Experiment
from lm.types import Device

# the objectives that models of each component were pretrained with
OBJECTIVES = {
    "decoder": "causal",
    "encoder": "mlm",
    "encoder_decoder": "span_corruption",
    "clip": "contrastive",
    "vit": "image_classification",
}


def import_folder(
    source: str,
    workdir: str,
    config: ConfigTree,
    devices: Sequence[Device],
    *,
    tokenizer: str | None = None,
    skip: Sequence[str] = (),
    ignored: Sequence[str] = (),
    allow_nonfinite: bool = False,
    say: Say = print,
) -> Experiment:
    """Write the model in the folder `source` as the run `workdir`, and return its experiment.

    config: what config.json doesn't say: data, optimizer, and how the model is computed.
    tokenizer: a file in place of that in `source`, or `bytes`. skip: regular expressions of names
    of tensors to skip. ignored: keys of config.json that are read as if they were not there.
    allow_nonfinite: accept tensors with entries that are NaN or infinite.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: `workdir` holds a run; a file is a pointer of Git LFS; tensors hold entries
        that are NaN or infinite; or config.json, tensors and the family's table don't match.
    """
    folder, out = Path(source), StoragePath(workdir)
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{source} has no config.json")
    if (out / CONFIG_FILE).exists():
        raise ValueError(f"{workdir} holds a run already; use another --workdir")
    tree = read_json(path)
    found = open_tensors(folder)
    kind = structure.family(tree.get("model_type", "none"))
    tensors = {name: found[old] for name, old in structure.rename(found, kind).items()}
    if left := len(found) - len(tensors):
        say(f"left out: {left} tensors beside those of the text model, for other kinds of input")
    section = structure.model_section(tree, tensors, ignored=ignored, say=say)
    config = _with_model(config, section, kind, say)
    if tokenizer is None:
        tokenizer = "bytes"
        if kind.reads_text:
            tokenizer = str(vocabulary.copy_tokenizer(folder, out / FOLDER))
    config.data.tokenizer = tokenizer
    if kind.image_processor is not None:
        pictures.complete(config, folder, tree, tensors, say)
    experiment = Experiment(config, devices)
    known, size = experiment.tokenizer.vocab_size, experiment.config.model.vocab_size
    if kind.reads_text:
        vocabulary.compare(experiment.tokenizer, tree, say)
    if kind.reads_text and known < size // 2:
        say(
            f"WARNING: the tokenizer has {known} tokens and the model {size}: most of what it says "
            "has no text here; give its own with --tokenizer=FILE"
        )
    _write_checkpoint(workdir, tensors, kind, experiment, skip, allow_nonfinite, say)
    (out / CONFIG_FILE).write_text(conversion.to_json(config))
    return experiment


def _with_model(config: ConfigTree, section: ConfigTree, kind: Family, say: Say) -> ConfigTree:
    """`config` with the model of an import.

    How the model is computed stays as in `config`, and rows are at most as long as the model's
    longest.
    """
    config = config.copy_and_resolve_references()
    if config.model.name == section.name:
        for path, value in leaves(config.model.to_dict()):
            if path in structure.COMPUTE or path.partition(".")[0] in structure.COMPUTE:
                section.update_from_flattened_dict({path: value})
    else:
        config.objective = conversion.default(objective=OBJECTIVES[section.name]).objective
        config.objective.update(dict(kind.objective))
        config.data.encoder_length = None
    config.model = section
    longest = structure.resolve(section).max_length
    if config.data.length > longest:
        say(f"config.data.length: {longest} and not {config.data.length}: the model's longest row")
        config.data.length = longest
    if structure.resolve(section).takes_encoder:
        given = config.data.encoder_length or config.data.length
        config.data.encoder_length = min(given, longest)
    return config


def _write_checkpoint(
    workdir: str,
    stored: Mapping[str, StoredTensor],
    family: Family,
    experiment: Experiment,
    skip: Sequence[str],
    allow_nonfinite: bool,
    say: Say,
) -> None:
    """Write the checkpoint of step 0. stored: by their names in the family's table."""
    abstract = param_tree.flatten(experiment.abstract_params)
    shapes = {name: tuple(leaf.shape) for name, leaf in abstract.items()}
    modules = family.modules(experiment.config.model)
    layout = {"transposed": family.transposed, "ones": family.ones}
    slices = table.parameter_slices(modules, shapes, **layout)
    tensors = {name: table.tensor_shape(parts) for name, parts in table.by_tensor(slices).items()}
    _check_tensors(tensors, stored, family, skip, say)
    started, count = time.monotonic(), sum(map(math.prod, shapes.values()))
    writer = ParamsWriter(workdir, step=0)
    sizes: dict[str, int] = {}
    nonfinite: dict[str, str] = {}
    for one in slices:
        if not any(one.index):
            writer.add(one.parameter, shapes[one.parameter], len(one.index))
        tensor = stored[one.tensor].read()
        sizes[one.tensor] = tensor.nbytes
        if bad := tensor.size - int(np.isfinite(tensor).sum()):
            nonfinite[one.tensor] = f"{one.tensor} ({bad} of {tensor.size:,} entries)"
        writer.write(one.parameter, one.index, np.asarray(one.from_tensor(tensor), np.float32, "C"))
    if nonfinite:
        listed = f"NaN or infinite: {table.shortened([*nonfinite.values()])}"
        if not allow_nonfinite:
            raise ValueError(
                f"the tensors have entries that are {listed}; get the files again, or take them "
                "as they are by --allow-nonfinite"
            )
        say(f"note: entries are {listed}")
    written = time.monotonic()
    writer.commit({"ledger": start_totals(), "config": experiment.config_dict.to_dict()})
    say(
        f"{len(tensors)} tensors, {count:,} parameters, {sum(sizes.values()) / 1e9:.2f} GB as "
        f"{4 * count / 1e9:.2f} GB in {written - started:.1f} s, read back in "
        f"{time.monotonic() - written:.1f} s"
    )


def _check_tensors(
    wanted: Mapping[str, Shape],
    stored: Mapping[str, StoredTensor],
    family: Family,
    skip: Sequence[str],
    say: Say,
) -> None:
    """Check that the stored tensors are those that the model needs, {name: shape}, and name those
    that hold no parameter: buffers, and what matches the regular expressions `skip`.

    Raises:
        ValueError: a tensor is missing, extra, of another shape or type, or differs from the one
        that it should repeat.
    """
    found = {name: tensor.shape for name, tensor in stored.items()}
    aliases = {n: other for n, other in family.aliases.items() if n in set(found) - set(wanted)}
    extra = {n: shape for n, shape in found.items() if n not in wanted and n not in aliases}
    unread = [n for n in extra if any(re.fullmatch(p, n) for p in (family.buffers, *skip))]
    problems = {
        "parameters without a tensor": [
            f"{n} {list(wanted[n])}" for n in sorted(set(wanted) - set(found))
        ],
        "tensors without a parameter (--skip=PATTERN leaves them out)": [
            f"{n} {list(extra[n])}" for n in sorted(set(extra) - set(unread))
        ],
        "other shapes": [
            f"{n}: {list(found[n])} in the file, {list(wanted[n])} by config.json"
            for n in sorted(set(wanted) & set(found))
            if wanted[n] != found[n]
        ],
    }
    if any(problems.values()):
        raise ValueError(
            "the tensors are not those of config.json:"
            + "".join(f"\n  {kind}: {table.shortened(n)}" for kind, n in problems.items() if n)
        )
    check_dtypes(stored[name] for name in (*wanted, *aliases))
    for name in unread:
        say(f"left out: {name} {list(found[name])}")
    for name, other in aliases.items():
        if not np.array_equal(stored[name].read(), stored[other].read()):
            raise ValueError(
                f"config.json says that {name} and {other} are one tensor, and they differ"
            )
