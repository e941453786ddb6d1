"""Files of checkpoints: steps, manifests, marks of verification.

WORKDIR/checkpoints/STEP/params/        Orbax's files of the parameters
                         opt_state/     and of the optimizer's state
                         manifest/      the manifest
                         verified-0-of-1   all files have been read back (by older code, N files
                                           verified-I-of-N: process I has read its part)
WORKDIR/bad_checkpoints/STEP[-K]/       checkpoints that didn't verify
"""

from __future__ import annotations

import time

import orbax.checkpoint as ocp

from lm.checkpoint.manifest import Damaged, Manifest
from lm.storage import files, filesystems
from lm.storage.epaths import StoragePath
from lm.storage.paths import is_url

ITEMS = ("params", "opt_state")
MANIFEST = "manifest"
MANIFEST_FILE = "manifest.json"
DELETING = "deleting"  # older code's file in a step's folder that is half deleted
TEMPORARY = ocp.path.atomicity.TMP_DIR_SUFFIX
COMMITTED = ocp.path.atomicity.COMMIT_SUCCESS_FILE


class Unreadable(PermissionError):
    """Files that may not be read, or whose storage doesn't answer: their checkpoint may be good."""


def steps(directory: StoragePath) -> list[int]:
    """The steps whose checkpoints in `directory` are complete, ascending."""
    return sorted(int(n) for n in files.list_names(directory) if is_complete(directory / n))


def can_rename(folder: StoragePath) -> bool:
    """True where a step gets its name by a rename once it is complete, instead of a commit file."""
    return not is_url(str(folder))


def is_complete(folder: StoragePath) -> bool:
    """True if a step's folder is whole; else its save or its deletion is under way."""
    if not folder.name.isdigit():
        return False
    names = files.list_names(folder)
    return (can_rename(folder) or COMMITTED in names) and DELETING not in names


def delete(folder: StoragePath) -> None:
    """Delete a checkpoint, first its name or its commit file: no half is left under the name."""
    if can_rename(folder):
        folder = folder.rename(folder.parent / f"{folder.name}{TEMPORARY}-{time.time_ns()}")
    else:
        (folder / COMMITTED).unlink(missing_ok=True)
    folder.rmtree()


def delete_leftovers(directory: StoragePath) -> None:
    """Delete remains of killed processes: incomplete saves and half deleted steps."""
    for path in directory.iterdir():
        if TEMPORARY in path.name:
            path.rmtree()
        elif path.name.isdigit() and not is_complete(path):
            delete(path)


def read_manifest(folder: StoragePath) -> Manifest:
    """The manifest of a step's folder.

    Raises:
        Unreadable: it may not be read.
        Damaged: there is none, or it isn't what was written for this step.
    """
    try:
        manifest = Manifest.from_json((folder / MANIFEST / MANIFEST_FILE).read_bytes())
    except (PermissionError, filesystems.StorageError) as error:
        raise Unreadable(str(error)) from None
    except OSError as error:
        raise Damaged(f"no manifest can be read: {error}") from None
    if str(manifest.step) != folder.name:
        raise Damaged(f"its manifest is that of step {manifest.step}")
    return manifest


def mark_verified(folder: StoragePath) -> None:
    (folder / "verified-0-of-1").touch()


def is_verified(folder: StoragePath) -> bool:
    """True if every part of a step's files has been read back and verified."""
    marks = {name for name in files.list_names(folder) if name.startswith("verified-")}
    counts = {int(name.rsplit("-", 1)[1]) for name in marks}
    return any(marks >= {f"verified-{i}-of-{n}" for i in range(n)} for n in counts)
