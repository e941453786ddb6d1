"""Make a run's folder of a checkpoint in Hugging Face's layout.

    python scripts/hf_import.py --source=SmolLM2-135M --workdir=runs/smollm
    python scripts/generate.py --workdir=runs/smollm --prompt='Gravity is' --greedy
    python scripts/train.py --config=configs/imported.py:runs/smollm --workdir=runs/smollm

SOURCE is a folder with config.json, model.safetensors or pytorch_model.bin (also in shards with an
index), and a tokenizer: tokenizer.json, a SentencePiece .model, GPT-2's vocab.json with merges.txt,
or BERT's vocab.txt. Its model's structure becomes config.model; everything else (data, optimizer,
model.dtype, model.remat) comes from --config, and can be set by --config.SECTION.KEY=VALUE. The
folder gets a checkpoint of step 0 with the parameters; training from it starts a new optimizer.

A key of config.json or a tensor that has no place here is an error that lists what is left on both
sides. A tensor that shall be left out, a head for another task say, is named by --skip=PATTERN, and
a key that makes no difference by --ignore-key=KEY.

Special tokens are those that config.json, generation_config.json and tokenizer_config.json say; the
run keeps these files. Texts begin with bos, unless they say that there is none (Qwen). GPT-2's say
nothing of it: its texts begin with `<|endoftext|>`, as documents did in its training, and
`transformers` puts nothing there (--start-ids= of scripts/generate.py does the same).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from lm import cli
from lm.config import command_line

_CONFIG = command_line.ConfigFlag(
    "What config.json doesn't say, as FILE or FILE:ARG.",
    str(Path(__file__).resolve().parent.parent / "configs" / "imported.py"),
)
_SOURCE = flags.DEFINE_string("source", None, "Folder with config.json, tensors and tokenizer.")
_WORKDIR = cli.define_workdir("Folder of the run to make.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "A tokenizer in place of that of the source: a file, or bytes."
)
_SKIP = flags.DEFINE_multi_string(
    "skip", [], "Regular expression of whole names of tensors to leave out; repeatable."
)
_IGNORE_KEY = flags.DEFINE_multi_string(
    "ignore-key", [], "Key of config.json to read as if it were not there; repeatable."
)
_ALLOW_NONFINITE = flags.DEFINE_bool(
    "allow-nonfinite", False, "Take tensors with entries that are NaN or infinite."
)


def main(argv: Sequence[str]) -> int:
    del argv
    if _SOURCE.value is None or _WORKDIR.value is None:
        raise app.UsageError("--source=FOLDER and --workdir=FOLDER are needed")
    import jax

    from lm.hf.importing import import_folder

    import_folder(
        _SOURCE.value,
        _WORKDIR.value,
        _CONFIG.value,
        jax.devices()[:1],
        tokenizer=_TOKENIZER.value,
        skip=_SKIP.value,
        ignored=_IGNORE_KEY.value,
        allow_nonfinite=_ALLOW_NONFINITE.value,
    )
    return 0


if __name__ == "__main__":
    cli.run_with_config(main, _CONFIG)
