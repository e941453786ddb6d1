"""From a folder in Hugging Face's layout to a run's folder: config, tokenizer, and a checkpoint of
step 0 with parameters alone.

Tensors are read, turned and written one at a time. The run's folder is like any other: it is
generated from, evaluated, exported, and trained on, for which a new optimizer state is made.
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
from lm.data.run_tokenizer import FOLDER
from lm.hf import structure, table, vocabulary
from lm.hf.files import Reader, read_json
from lm.hf.keys import Say
from lm.hf.nested import text_names
from lm.optim import param_tree
from lm.reliability.data_ledger import start_totals
from lm.training.experiment import CONFIG_FILE, Experiment

# of a model that the config is not for: what it was pretrained with
OBJECTIVES = {"decoder": "causal", "encoder": "mlm", "encoder_decoder": "span_corruption"}


def import_folder(
    source: str,
    workdir: str,
    config: Any,
    devices: Sequence[Any],
    *,
    tokenizer: str | None = None,
    skip: Sequence[str] = (),
    ignored: Sequence[str] = (),
    allow_nonfinite: bool = False,
    say: Say = print,
) -> Experiment:
    """Makes the run's folder `workdir` of the model in `source`, and returns its experiment.

    config: what config.json doesn't say: data, optimizer, and of the model how it is computed.
    tokenizer: a file in place of that in `source`, or `bytes`. skip: regular expressions of
    tensors that are left out. ignored: keys of config.json that are read as if they were not
    there. allow_nonfinite: take tensors with entries that are NaN or infinite.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: `workdir` is in use; a file is a pointer of Git LFS; tensors hold entries that
        are NaN or infinite; or config.json, tensors and table don't fit together, and the message
        lists what.
    """
    folder, out = Path(source), epath.Path(workdir)
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{source} has no config.json")
    if (out / CONFIG_FILE).exists():
        raise ValueError(f"{workdir} holds a run already; use another --workdir")
    tree = read_json(path)
    reader = Reader(folder)
    names = text_names(tree.get("model_type", ""), list(reader.shapes))
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
    read_into(
        workdir,
        reader,
        names,
        structure.family(tree["model_type"]),
        experiment,
        skip=skip,
        allow_nonfinite=allow_nonfinite,
        say=say,
    )
    (out / CONFIG_FILE).write_text(conversion.to_json(config))
    return experiment


def with_model(config: Any, section: Any, say: Say) -> Any:
    """`config` with the model of an import, but computed as `config` says; rows are no longer than
    the model's longest.
    """
    config = config.copy_and_resolve_references()
    if config.model.name == section.name:
        for path in structure.COMPUTE:
            if configured := _find(config.model, path):
                section.update_from_flattened_dict({path: configured[0]})
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


def _find(section: Any, path: str) -> list[Any]:
    """The value at `path` of a section, in a list; [] if there is none."""
    for key in path.split("."):
        if key not in section:
            return []
        section = section[key]
    return [section]


def read_into(
    workdir: str,
    reader: Reader,
    there: Mapping[str, str],
    family: structure.Family,
    experiment: Experiment,
    *,
    skip: Sequence[str] = (),
    allow_nonfinite: bool = False,
    say: Say = print,
) -> None:
    """Writes the checkpoint of step 0 with the tensors of `reader`, of the names
    {that of the model: that in the files}.
    """
    model = experiment.config.model
    abstract = param_tree.flatten(experiment.abstract_params)
    leaves = {name: tuple(leaf.shape) for name, leaf in abstract.items()}
    where = table.places(family.weight_map(model), leaves)
    held = table.tensors(where)
    names = {name: there[old] for name, old in structure.rename(list(there), family).items()}
    wanted = {name: table.tensor_shape(parts) for name, parts in held.items()}
    aliases = family.aliases(model)
    shapes = {name: reader.shapes[file_name] for name, file_name in names.items()}
    unread = table.match(wanted, shapes, aliases=aliases, buffers=family.BUFFERS, skip=skip)
    reader.check_dtypes(names[name] for name in names if name in wanted or name in aliases)
    for name in unread:
        if name not in aliases:
            say(f"left out: {name} {list(shapes[name])}")
        elif not np.array_equal(reader.read(names[name]), reader.read(names[aliases[name]])):
            raise ValueError(
                f"config.json says that {name} and {aliases[name]} are one tensor, and they differ"
            )
    begun, count = time.monotonic(), sum(math.prod(shape) for shape in leaves.values())
    writer = ParamsWriter(workdir, step=0)
    nonfinite: dict[str, str] = {}
    for place in where:
        if not any(place.index):
            writer.add(place.row.parameter, leaves[place.row.parameter], len(place.index))
        tensor = reader.read(names[place.name])
        if bad := tensor.size - int(np.isfinite(tensor).sum()):
            nonfinite[place.name] = f"{place.name} ({bad} of {tensor.size:,} entries)"
        writer.write(
            place.row.parameter, place.index, np.asarray(place.read(tensor), np.float32, "C")
        )
    if nonfinite:
        listed = f"NaN or infinite: {table.some([*nonfinite.values()])}"
        if not allow_nonfinite:
            raise ValueError(
                f"the tensors have entries that are {listed}; get the files again, or take them "
                "as they are by --allow-nonfinite"
            )
        say(f"note: entries are {listed}")
    written = time.monotonic()
    writer.commit({"ledger": start_totals(), "config": experiment.config_dict.to_dict()})
    say(
        f"{len(held)} tensors, {count:,} parameters, {reader.num_bytes / 1e9:.2f} GB as "
        f"{4 * count / 1e9:.2f} GB in {written - begun:.1f} s, read back in "
        f"{time.monotonic() - written:.1f} s"
    )
