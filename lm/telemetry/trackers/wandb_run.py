"""A run at Weights & Biases, or of its offline mode, through the package wandb.

Its client reads WANDB_MODE (offline), WANDB_ENTITY, WANDB_DIR and so on, and keeps its files in the
run's folder unless WANDB_DIR names another one.
"""

from __future__ import annotations

import io
import json
import posixpath
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm.storage import files
from lm.storage.paths import is_url
from lm.telemetry.trackers.tracker import RunInfo, Status

HEADER = b":W&B"  # of a file run-ID.wandb; its 7 bytes end with a magic number and a version
BLOCK = 32 << 10
TEARDOWN_SECONDS = 2.0


class WandbRun:
    """Rows by step. The client joins the values of a step, and takes no step back."""

    def __init__(self, info: RunInfo, run_id: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._wandb: Any = wandb
        settings = wandb.Settings(console="off", silent=True, save_code=False)
        wandb.setup(settings)  # silent: it asks nobody for an account
        self._run: Any = wandb.init(
            id=run_id,
            resume="allow",
            reinit="create_new",  # a process may train several runs
            project=info.project,
            name=info.name,
            tags=info.tags,
            notes=info.notes,
            config={**info.config, "code_version": dict(info.code)},
            allow_val_change=True,
            dir=None if is_url(info.workdir) else info.workdir,
            settings=settings,
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def last_steps(self) -> dict[str, int]:
        # .../wandb/offline-run-DATE-ID/files
        in_files = _last_steps(posixpath.dirname(posixpath.dirname(self._run.dir)), self._run.id)
        if self._run.offline:
            return in_files
        at_server = self._run.starting_step - 1
        names = {*self._run.summary.keys(), *in_files} if at_server >= 0 else set()
        return {name: min(at_server, in_files.get(name, at_server)) for name in names}

    def log(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        for step, values in rows:
            self._log(step, dict(values))

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        columns = list(rows[0])
        data = [[row[column] for column in columns] for row in rows]
        self._log(step, {name: self._wandb.Table(columns=columns, data=data)})

    def picture(self, step: int, name: str, png: bytes) -> None:
        from PIL import Image

        self._log(step, {name: self._wandb.Image(Image.open(io.BytesIO(png)))})

    def close(self, status: Status) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)

    @staticmethod
    def abandon() -> None:
        """Else a hook of the client waits at the end of the process until all is uploaded."""
        thread = threading.Thread(target=_teardown, daemon=True)
        thread.start()
        thread.join(TEARDOWN_SECONDS)  # it removes that hook first, and then waits itself

    def _log(self, step: int, values: dict[str, Any]) -> None:
        # an evaluation that a stop signal has put off comes after the row of its step was closed
        self._run.log({**values, "step": step}, step=max(step, self._run.step))


def _teardown() -> None:
    import wandb  # pyright: ignore[reportMissingImports] - another thread may be importing it

    wandb.teardown()


def _last_steps(folder: str, run_id: str) -> dict[str, int]:
    """The last step of each value in the files of all processes of a run."""
    found: dict[str, int] = {}
    for name in files.list_names(folder):
        if name.endswith(f"-{run_id}"):
            try:
                content = files.read_bytes(f"{folder}/{name}/run-{run_id}.wandb")
            except FileNotFoundError:
                continue
            for row in read_rows(content):
                if (step := row.get("step")) is not None:
                    found |= {k: max(step, found.get(k, -1)) for k in row}
    return found


def read_rows(content: bytes) -> Iterator[dict[str, Any]]:
    """The rows of a file run-ID.wandb: {name: value}, with the client's own `_step`."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    for data in _read_log(content):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in items}


def _read_log(content: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format after W&B's header, up to one that a kill has cut.

    Blocks of 32 KiB; in them parts: checksum, size and kind in 7 bytes, then the data. Kinds: 1 a
    whole record, 2, 3, 4 its first, middle and last part; no part begins in the last 6 bytes.
    """
    if content[:4] != HEADER:
        return
    at, parts = 7, []
    while True:
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
        if at + 7 > len(content):
            return
        _, size, kind = struct.unpack_from("<IHB", content, at)
        part = content[at + 7 : at + 7 + size]
        if kind == 0 or len(part) < size:
            return
        at += 7 + size
        parts.append(part)
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []
