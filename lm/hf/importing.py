"""From a folder in Hugging Face's layout to a run's folder: config, tokenizer, and a checkpoint of
step 0 with parameters alone.

Tensors are read, turned and written one at a time. The run's folder is like any other: it is
generated from, evaluated, exported, and trained on, for which a new optimizer state is made.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from lm import config_tree, parameters
from lm.checkpoint.streamed import ParamsWriter
from lm.data.run_tokenizer import FOLDER
from lm.experiment import CONFIG_FILE, Experiment
from lm.hf import structure, table, vocabulary
from lm.hf.files import Reader
from lm.ledger import start_totals

# of a model that the config is not for: what it was pretrained with
OBJECTIVES = {"decoder": "causal", "encoder": "mlm", "encoder_decoder": "span_corruption"}

Say = Callable[[str], Any]


def import_folder(
    source: str,
    workdir: str,
    config: Any,
    devices: Sequence[Any],
    *,
    tokenizer: str | None = None,
    skip: Sequence[str] = (),
    say: Say = print,
) -> Experiment:
    """Makes the run's folder `workdir` of the model in `source`, and returns its experiment.

    config: what config.json doesn't say: data, optimizer, and of the model how it is computed.
    tokenizer: a file in place of that in `source`, or `bytes`. skip: regular expressions of
    tensors that are left out.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: `workdir` is in use; or config.json, tensors and table don't fit together, and
        the message lists what.
    """
    folder, out = Path(source), epath.Path(workdir)
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{source} has no config.json")
    if (out / CONFIG_FILE).exists():
        raise ValueError(f"{workdir} holds a run already; use another --workdir")
    tree = json.loads(path.read_text())
    reader = Reader(folder)
    config = with_model(config, structure.model_section(tree, reader.shapes), say)
    config.data.tokenizer = tokenizer or str(vocabulary.bring(folder, out / FOLDER))
    experiment = Experiment(config, devices)
    vocabulary.compare(experiment.tokenizer, tree, say)
    read_into(workdir, reader, structure.family(tree["model_type"]), experiment, skip=skip, say=say)
    (out / CONFIG_FILE).write_text(config_tree.to_json(config))
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
        config.objective = config_tree.default(objective=OBJECTIVES[section.name]).objective
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
    family: structure.Family,
    experiment: Experiment,
    *,
    skip: Sequence[str] = (),
    say: Say = print,
) -> None:
    """Writes the checkpoint of step 0 with the tensors of `reader`."""
    model = experiment.config.model
    abstract = parameters.flatten(experiment.abstract_params)
    leaves = {name: tuple(leaf.shape) for name, leaf in abstract.items()}
    where = table.places(family.rows(model), leaves)
    held = table.tensors(where)
    names = structure.rename(list(reader.shapes), family)
    wanted = {name: table.tensor_shape(parts) for name, parts in held.items()}
    aliases = family.aliases(model)
    there = {name: reader.shapes[file_name] for name, file_name in names.items()}
    unread = table.match(wanted, there, aliases=aliases, buffers=family.BUFFERS, skip=skip)
    for name in unread:
        if name not in aliases:
            say(f"left out: {name} {list(there[name])}")
        elif not np.array_equal(reader.read(names[name]), reader.read(names[aliases[name]])):
            raise ValueError(
                f"config.json says that {name} and {aliases[name]} are one tensor, and they differ"
            )
    begun, count = time.monotonic(), sum(math.prod(shape) for shape in leaves.values())
    writer = ParamsWriter(workdir, step=0)
    for place in where:
        if not any(place.index):
            writer.add(place.row.ours, leaves[place.row.ours], len(place.index))
        tensor = reader.read(names[place.name])
        writer.write(place.row.ours, place.index, np.asarray(place.read(tensor), np.float32, "C"))
    written = time.monotonic()
    writer.commit({"ledger": start_totals(), "config": experiment.config_dict.to_dict()})
    say(
        f"{len(held)} tensors, {count:,} parameters, {reader.num_bytes / 1e9:.2f} GB as "
        f"{4 * count / 1e9:.2f} GB in {written - begun:.1f} s, read back in "
        f"{time.monotonic() - written:.1f} s"
    )
