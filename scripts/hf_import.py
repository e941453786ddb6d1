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

from pathlib import Path

from lm import cli

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "imported.py"


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_config(str(CONFIG), "what config.json doesn't say, as FILE or FILE:ARG")
    add = parser.add_argument
    add("--source", required=True, help="folder with config.json, tensors and tokenizer")
    add("--workdir", type=cli.folder, required=True, help="folder of the run to make")
    add("--tokenizer", help="a tokenizer in place of that of the source: a file, or bytes")
    add(
        "--skip",
        action="append",
        default=[],
        help="regular expression of whole names of tensors to leave out; repeatable",
    )
    add(
        "--ignore-key",
        action="append",
        default=[],
        help="key of config.json to read as if it were not there; repeatable",
    )
    add(
        "--allow-nonfinite",
        action="store_true",
        help="take tensors with entries that are NaN or infinite",
    )
    args = parser.parse_args()
    import jax

    from lm.hf.importing import import_folder

    import_folder(
        args.source,
        args.workdir,
        args.config,
        jax.devices()[:1],
        tokenizer=args.tokenizer,
        skip=args.skip,
        ignored=args.ignore_key,
        allow_nonfinite=args.allow_nonfinite,
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
