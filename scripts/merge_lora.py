"""Merge the adapters of a LoRA run into their base: a plain run.

    python scripts/train.py --config=configs/gpt2.py --workdir=runs/adapted \\
        --config.init.from=runs/base --config.model.lora.rank=8
    python scripts/merge_lora.py --workdir=runs/adapted --out=runs/merged

The new run has a checkpoint of step 0, and computes what the adapted one does (each weight plus its
adapter's product, in float32). scripts/hf_export.py gives it to `transformers`.
"""

from __future__ import annotations

from lm import cli


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--workdir", type=cli.folder, required=True, help="folder of the run with adapters")
    add("--out", type=cli.folder, required=True, help="folder of the run to make")
    add("--step", type=int, help="checkpoint to use (default: the newest)")
    args = parser.parse_args()

    import jax

    from lm.checkpoint import step_files
    from lm.storage import files
    from lm.storage.epaths import StoragePath
    from lm.training.merge_lora import merge_run

    merge_run(args.workdir, args.out, jax.devices()[:1], step=args.step)
    sizes = []
    for folder in (args.workdir, args.out):
        directory = StoragePath(folder) / "checkpoints"
        newest = directory / str(step_files.steps(directory)[-1])
        sizes.append(files.total_size(newest) / 2**20)
    print(
        f"{args.out}: checkpoint of {sizes[1]:.2f} MiB; that of the adapters, with the optimizer's "
        f"state, has {sizes[0]:.2f} MiB"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
