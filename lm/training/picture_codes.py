"""Codes of pictures by the VQ-VAE of a run, and token stores of captions with codes.

A store has the fields `text` and `codes`, as `lm.objectives.dalle` reads them, and its manifest the
entry `codes`: the grid, the number of codes, the pictures, and the VQ-VAE with the hash of its
parameters. Shards are written one by one; started again, an interrupted run goes on with the first
that is missing, and refuses a folder whose codes have another origin.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lm.checkpoint import manifest as manifests
from lm.checkpoint.restore import device_checksums
from lm.config import conversion
from lm.config.schema import DataConfig
from lm.data import pipeline
from lm.data.rows import RowLayout, Rows, RowSource
from lm.data.store_files import MANIFEST
from lm.data.tokens import NoStore, TokenStore
from lm.objectives.dalle import FIELDS
from lm.parallel import sharding
from lm.preparation import arrow_files, token_writer
from lm.storage import files as storage
from lm.storage import lease
from lm.storage.paths import expand_path
from lm.tokenizers import tokenizer as tokenizers
from lm.tokenizers.tokenizer import Tokenizer
from lm.training.experiment import Experiment
from lm.training.restore import restore_params
from lm.training.stored_run import load
from lm.types import Device

if TYPE_CHECKING:
    import pyarrow as pa

_LONGEST = 512  # tokens of a synthetic caption
_PLAN, _ENTRY = "plan.json", "entry.json"


class PictureCoder:
    """The VQ-VAE of a run's newest checkpoint, or of the one at `step`, on these devices."""

    def __init__(
        self,
        workdir: str,
        devices: Sequence[Device],
        *,
        step: int | None = None,
        batch_size: int = 256,
    ) -> None:
        """batch_size: pictures of a compiled step, rounded up to what the devices divide."""
        self.workdir = workdir
        experiment = load(workdir, devices)
        if (name := conversion.names(experiment.config_dict)["model"]) != "vqvae":
            raise ValueError(f"{workdir} is a run of config.model.name={name}, not of a vqvae")
        self.config = experiment.config.model
        self.step, self._params = restore_params(experiment, workdir, step)
        self._rules, model = experiment.rules, experiment.model
        shards = self._rules.size("batch")
        self.batch_size = -(-batch_size // shards) * shards

        def method(name: str) -> Callable[..., jax.Array]:
            run = functools.partial(model.apply, method=name)
            jitted = jax.jit(lambda params, x: run({"params": params}, x))
            return lambda x: jitted(self._params, x)

        self._encode, self._decode = method("encode"), method("decode")

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the parameters: names, shapes and bits."""
        tree = {"params": self._params}
        return manifests.fingerprint(manifests.leaves(tree, device_checksums(tree)))

    def describe(self) -> dict[str, Any]:
        """The codes and their origin, for JSON."""
        return {
            "grid_size": self.config.grid_size,
            "num_codes": self.config.num_codes,
            "image_size": self.config.image_size,
            "vqvae": {"run": self.workdir, "step": self.step, "fingerprint": self.fingerprint},
        }

    def encode(self, images: np.ndarray) -> np.ndarray:
        """images: uint8 [n, height, width, 3] -> codes, int32 [n, P], row by row."""
        return self._in_batches(self._encode, images)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """codes: int32 [n, P] -> uint8 [n, height, width, 3]."""
        return self._in_batches(self._decode, codes)

    def _in_batches(self, run: Callable[..., jax.Array], rows: np.ndarray) -> np.ndarray:
        """`run` of all rows, in batches of one size."""
        found = []
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            missing = self.batch_size - len(part)
            padded = np.pad(part, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
            axes = self._rules.sharding(*sharding.row_axes(rows.ndim))
            found.append(np.asarray(run(jax.device_put(padded, axes)))[: len(part)])
        return np.concatenate(found)


def coder_of(experiment: Experiment, vqvae: str | None, devices: Sequence[Device]) -> PictureCoder:
    """The VQ-VAE whose codes a run of `lm.objectives.dalle` draws: that of its training data, which
    may have moved to the folder `vqvae`.

    Raises:
        ValueError: it is not known, or the run at `vqvae` has other codes.
    """
    recorded = next(filter(None, map(_recorded_codes, experiment.config.data.train)), None)
    if vqvae is None and recorded is None:
        raise ValueError("--vqvae=RUN: no store of config.data.train is here that names the VQ-VAE")
    known = recorded["vqvae"] if recorded else {"run": vqvae, "step": None}
    coder = PictureCoder(vqvae or known["run"], devices, step=known["step"])
    if recorded and coder.fingerprint != known["fingerprint"]:
        raise ValueError(
            f"--vqvae={coder.workdir}: its parameters at step {coder.step} are not those of the "
            "VQ-VAE that made the codes of config.data.train"
        )
    for name in ("grid_size", "num_codes"):
        found, wanted = getattr(coder.config, name), getattr(experiment.config.objective, name)
        if found != wanted:
            raise ValueError(
                f"--vqvae={coder.workdir} has {name} {found}, config.objective.{name} is {wanted}"
            )
    return coder


def _recorded_codes(path: str) -> dict[str, Any] | None:
    """The entry `codes` in the manifest of a store; None where there is none."""
    if path.startswith("synthetic:"):
        return None
    try:
        return TokenStore.open(path).manifest.get("codes")
    except NoStore:
        return None


def open_pictures(
    path: str, image_size: int, tokenizer: str | None = None
) -> tuple[RowSource, Tokenizer, str]:
    """(pictures with captions, the tokenizer of these, a hash of them) of a token store, or of
    `synthetic:shapes...`; tokenizer: of synthetic captions, and of a store None or its own.
    """
    config = DataConfig()
    if path.startswith("synthetic:"):
        loaded, length, content = tokenizers.load(tokenizer or "bytes"), _LONGEST, path
    else:
        store = TokenStore.open(path)
        loaded = tokenizers.load(tokenizer) if tokenizer else store.tokenizer()
        length = max((shard.longest_document for shard in store.shards), default=1)
        content = store.manifest["content_hash"]
    layout = RowLayout((max(length, 1),), image_size=image_size)
    return pipeline.make_source(path, config, layout, loaded), loaded, content


def write_store(
    coder: PictureCoder,
    data: str,
    out: str,
    *,
    tokenizer: str | None = None,
    shard_pictures: int = 16_384,
    report: Callable[[int, int], object] = lambda done, count: None,
) -> dict[str, Any]:
    """Write the captions and codes of the pictures `data` as a token store at `out`, as far as it
    is missing, and return its manifest.

    report: called with the pictures done, and their count.

    Raises:
        ValueError: `out` holds something else, or another process writes it.
    """
    out = expand_path(out, "--out").rstrip("/")
    source, own_tokenizer, content = open_pictures(data, coder.config.image_size, tokenizer)
    plan = coder.describe() | {"pictures": {"data": data, "content": content}}
    plan["pictures"] |= {"count": len(source), "shard": shard_pictures}
    plan["tokenizer"] = own_tokenizer.fingerprint
    if storage.exists(f"{out}/{MANIFEST}"):
        found = json.loads(storage.read_bytes(f"{out}/{MANIFEST}"))
        _check_plan(out, found.get("codes"), plan)
        return found
    try:
        with lease.lock(f"{out}.lock"):
            if storage.exists(f"{out}/{_PLAN}"):
                _check_plan(out, json.loads(storage.read_bytes(f"{out}/{_PLAN}")), plan)
            elif storage.exists(out) and storage.list_names(out):
                raise ValueError(f"--out={out} is a folder of other files: name another one")
            storage.write_atomically(f"{out}/{_PLAN}", json.dumps(plan))
            shards = [*_write_shards(coder, source, own_tokenizer, out, shard_pictures, report)]
            token_writer.write_manifest(
                out,
                shards,
                own_tokenizer,
                tokenizer_name=own_tokenizer.name,
                fields=FIELDS,
                source=[data],
                codes=plan,
                dtype=_dtype(coder, own_tokenizer),
            )
    except lease.Locked as error:
        raise ValueError(f"--out={out}: {error} is writing it") from None
    storage.delete(f"{out}.lock")
    return json.loads(storage.read_bytes(f"{out}/{MANIFEST}"))


def _check_plan(out: str, found: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    """Raise ValueError unless a store has the codes that are wanted. Runs may have moved."""
    if found is None:
        raise ValueError(f"--out={out} is a token store of other data: name another folder")

    def comparable(plan: dict[str, Any]) -> dict[str, Any]:
        return plan | {"vqvae": plan["vqvae"]["fingerprint"]} | plan["pictures"] | {"pictures": ""}

    old, new = comparable(found), comparable(wanted)
    if different := [
        f"{key} (there {old.get(key)}, now {new[key]})" for key in new if old.get(key) != new[key]
    ]:
        raise ValueError(
            f"--out={out} holds codes of another origin: {', '.join(different)}; name another "
            "folder, or remove it"
        )


def _write_shards(
    coder: PictureCoder,
    source: RowSource,
    tokenizer: Tokenizer,
    out: str,
    shard_pictures: int,
    report: Callable[[int, int], object],
) -> Iterator[dict[str, Any]]:
    """Yield the entry of every shard, written now or by an earlier run."""
    for number, start in enumerate(range(0, len(source), shard_pictures)):
        stop = min(start + shard_pictures, len(source))
        entry = f"{out}/shard-{number:05d}/{_ENTRY}"
        if storage.exists(entry):
            yield json.loads(storage.read_bytes(entry))
        else:
            blocks = _blocks(coder, source, tokenizer, np.arange(start, stop))
            shard = token_writer.write_shard(out, number, blocks, fields=FIELDS)
            storage.write_atomically(entry, json.dumps(shard))
            yield shard
        report(stop, len(source))


def _blocks(
    coder: PictureCoder, source: RowSource, tokenizer: Tokenizer, numbers: np.ndarray
) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(numbers), coder.batch_size):
        chosen = numbers[start : start + coder.batch_size]
        rows = source.read(chosen)
        assert rows.images is not None, "the layout has pictures"
        ids = [spans[0].id for spans in source.documents(chosen)]
        dtype = _dtype(coder, tokenizer)
        yield _block(ids, rows, coder.encode(rows.images), tokenizer, dtype)


def _block(
    ids: Sequence[str], rows: Rows, codes: np.ndarray, tokenizer: Tokenizer, dtype: str
) -> pa.RecordBatch:
    """The documents of rows as `lm.preparation.token_writer.encode_block` makes them."""
    import pyarrow as pa

    held = rows.segments != 0
    texts = [
        tokenizer.decode_bytes(row[kept][:-1]) for row, kept in zip(rows.ids, held, strict=True)
    ]
    values = {
        "text": (rows.ids[held], held.sum(1)),
        "codes": (codes, np.full(len(codes), codes.shape[1])),
    }
    num_bytes = {"text": [len(text) for text in texts], "codes": [0] * len(texts)}
    names = [name.encode(errors="surrogateescape") for name in ids]
    columns: dict[str, pa.Array] = {"id": arrow_files.bytes_column(names)}
    for field, (tokens, lengths) in values.items():
        offsets = np.concatenate([[0], lengths]).astype(np.int64).cumsum()
        columns[f"tokens.{field}"] = pa.LargeListArray.from_arrays(
            arrow_files.column(offsets), arrow_files.column(tokens.ravel().astype(dtype))
        )
        columns[f"bytes.{field}"] = arrow_files.column(np.array(num_bytes[field], np.int64))
    return pa.RecordBatch.from_arrays([*columns.values()], [*columns])


def _dtype(coder: PictureCoder, tokenizer: Tokenizer) -> str:
    """The type of the store's tokens: of captions, and of codes."""
    return "<u4" if coder.config.num_codes > 1 << 16 else token_writer.token_dtype(tokenizer)
