"""Import of a folder in Hugging Face's layout as a run: config, tokenizer, and a checkpoint of step
0 that holds only parameters.

Tensors are read, transposed and written one at a time. The run is like any other: it generates, is
evaluated, exported, and trained on with a new optimizer state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from lm.checkpoint.streamed import ParamsWriter
from lm.config import conversion
from lm.config.tree import ConfigTree, leaves
from lm.data.run_tokenizer import FOLDER
from lm.hf import structure, table, vocabulary
from lm.hf.family import Family
from lm.hf.files import Reader, read_json
from lm.hf.keys import Say
from lm.hf.nested import text_names
from lm.hf.table import ParameterSlice
from lm.optim import param_tree
from lm.reliability.data_ledger import start_totals
from lm.training.experiment import CONFIG_FILE, Experiment

# the objectives that models of each component were pretrained with
OBJECTIVES = {"decoder": "causal", "encoder": "mlm", "encoder_decoder": "span_corruption"}


def import_folder(
    source: str,
    workdir: str,
    config: ConfigTree,
    devices: Sequence[Any],
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
    folder, out = Path(source), epath.Path(workdir)
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{source} has no config.json")
    if (out / CONFIG_FILE).exists():
        raise ValueError(f"{workdir} holds a run already; use another --workdir")
    tree = read_json(path)
    reader = Reader(folder)
    names = text_names(tree.get("model_type", ""), reader.shapes)
    if left := len(reader.shapes) - len(names):
        say(f"left out: {left} tensors beside those of the text model, for other kinds of input")
    section = structure.model_section(tree, names, ignored=ignored, say=say)
    config = with_model(config, section, say)
    config.data.tokenizer = tokenizer or str(vocabulary.copy_tokenizer(folder, out / FOLDER))
    experiment = Experiment(config, devices)
    vocabulary.compare(experiment.tokenizer, tree, say)
    known, size = experiment.tokenizer.vocab_size, experiment.config.model.vocab_size
    if known < size // 2:
        say(
            f"WARNING: the tokenizer has {known} tokens and the model {size}: most of what it says "
            "has no text here; give its own with --tokenizer=FILE"
        )
    kind, options = structure.family(tree["model_type"]), {"skip": skip, "say": say}
    write_checkpoint(
        workdir, reader, names, kind, experiment, allow_nonfinite=allow_nonfinite, **options
    )
    (out / CONFIG_FILE).write_text(conversion.to_json(config))
    return experiment


def with_model(config: ConfigTree, section: ConfigTree, say: Say) -> ConfigTree:
    """`config` with the model of an import.

    How the model is computed stays as in `config`, and rows are at most as long as the model's
    longest.
    """
    config = config.copy_and_resolve_references()
    if config.model.name == section.name:
        configured = dict(leaves(config.model.to_dict()))
        section.update_from_flattened_dict(
            {
                path: value
                for path, value in configured.items()
                if path in structure.COMPUTE or path.partition(".")[0] in structure.COMPUTE
            }
        )
    else:
        config.objective = conversion.default(objective=OBJECTIVES[section.name]).objective
        config.data.encoder_length = None
    config.model = section
    longest = section.max_length
    if config.data.length > longest:
        say(f"config.data.length: {longest} and not {config.data.length}: the model's longest row")
        config.data.length = longest
    if structure.resolve(section).takes_encoder:
        given = config.data.encoder_length or config.data.length
        config.data.encoder_length = min(given, longest)
    return config


def write_checkpoint(
    workdir: str,
    reader: Reader,
    names: Mapping[str, str],
    family: Family,
    experiment: Experiment,
    *,
    skip: Sequence[str] = (),
    allow_nonfinite: bool = False,
    say: Say = print,
) -> None:
    """Write the checkpoint of step 0 with the tensors of `reader`.

    names: {name in the text model: name in the files}.
    """
    abstract = param_tree.flatten(experiment.abstract_params)
    shapes = {name: tuple(leaf.shape) for name, leaf in abstract.items()}
    slices = table.parameter_slices(family.weight_map(experiment.config.model), shapes)
    tensors = table.by_tensor(slices)
    files = {name: names[old] for name, old in structure.rename(names, family).items()}
    _check(
        tensors, files, reader, family.aliases(experiment.config.model), family.buffers, skip, say
    )
    started, count = time.monotonic(), sum(map(math.prod, shapes.values()))
    writer = ParamsWriter(workdir, step=0)
    nonfinite: dict[str, str] = {}
    for one in slices:
        parameter = one.mapping.parameter
        if not any(one.index):
            writer.add(parameter, shapes[parameter], len(one.index))
        tensor = reader.read(files[one.tensor])
        if bad := tensor.size - int(np.isfinite(tensor).sum()):
            nonfinite[one.tensor] = f"{one.tensor} ({bad} of {tensor.size:,} entries)"
        writer.write(parameter, one.index, np.asarray(one.from_tensor(tensor), np.float32, "C"))
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
        f"{len(tensors)} tensors, {count:,} parameters, {reader.num_bytes / 1e9:.2f} GB as "
        f"{4 * count / 1e9:.2f} GB in {written - started:.1f} s, read back in "
        f"{time.monotonic() - written:.1f} s"
    )


def _check(
    tensors: Mapping[str, Sequence[ParameterSlice]],
    files: Mapping[str, str],
    reader: Reader,
    aliases: Mapping[str, str],
    buffers: str,
    skip: Sequence[str],
    say: Say,
) -> None:
    """Check that the tensors of `reader` are those of the model, and that aliases repeat them.

    files: {name in the family's table: name in the files}.
    """
    shapes = {name: reader.shapes[file_name] for name, file_name in files.items()}
    wanted = {name: table.tensor_shape(parts) for name, parts in tensors.items()}
    unread = table.check_tensors(shapes, wanted, aliases=aliases, buffers=buffers, skip=skip)
    reader.check_dtypes(file for name, file in files.items() if name in wanted or name in aliases)
    for name in unread:
        if name not in aliases:
            say(f"left out: {name} {list(shapes[name])}")
        elif not np.array_equal(reader.read(files[name]), reader.read(files[aliases[name]])):
            raise ValueError(
                f"config.json says that {name} and {aliases[name]} are one tensor, and they differ"
            )
