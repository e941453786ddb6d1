"""The copy of the tokenizer in a run's folder, RUN/tokenizer/: a folder that was moved or copied to
another machine needs no other path.
"""

from pathlib import PurePath

from lm.storage.epaths import StoragePath
from lm.storage.files import write_atomically
from lm.tokenizers import special_tokens
from lm.tokenizers.tokenizer import Tokenizer

FOLDER = "tokenizer"
# files beside the tokenizer's own, for `transformers` and chat templates
COMPANION_FILES = (
    special_tokens.TOKENIZER_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    special_tokens.GENERATION_FILE,
    special_tokens.MODEL_FILE,
)


def save(tokenizer: Tokenizer, workdir: str, *, replace: bool = False) -> None:
    """Copy the tokenizer's file, and the files that describe it, into the run's folder.

    replace: overwrite another content of the file.

    Raises:
        ValueError: the run has been trained with another content of the file of this name.
    """
    if not tokenizer.model:  # bytes: no file
        return
    source, folder = StoragePath(tokenizer.name), StoragePath(workdir) / FOLDER
    kept = folder / source.name
    if kept.exists() and kept.read_bytes() != tokenizer.model and not replace:
        raise ValueError(
            f"config.data.tokenizer={tokenizer.name} is not the tokenizer that this run was "
            f"trained with ({kept}): give that one, another --workdir, or allow it "
            "(--config.checkpoint.allow_changed=\"('data.tokenizer',)\")"
        )
    found = {name: source.parent / name for name in COMPANION_FILES}
    contents = {name: file.read_bytes() for name, file in found.items() if file.exists()}
    for name, content in {**contents, source.name: tokenizer.model}.items():
        if not (folder / name).exists() or (folder / name).read_bytes() != content:
            write_atomically(folder / name, content)


def find(workdir: str, name: str) -> str:
    """Return the path of the run's copy of the tokenizer `name`, or `name` where it has none."""
    kept = StoragePath(workdir) / FOLDER / PurePath(name).name
    return str(kept) if name != "bytes" and kept.exists() else name
