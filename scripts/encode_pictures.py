"""Pictures to codes: write captions and the codes of a trained VQ-VAE as a token store.

    python scripts/encode_pictures.py --vqvae=runs/vqvae --data=data/pictures/train \\
        --out=data/codes/train
    python scripts/encode_pictures.py --vqvae=runs/vqvae --data=synthetic:shapes:65536:0:seen \\
        --out=data/shapes-codes/train

The store is for config.objective.name=dalle. Started again, an interrupted run goes on where it
was.
"""

from __future__ import annotations

from lm import cli


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--vqvae", type=cli.folder, required=True, help="folder of the VQ-VAE's run")
    add("--step", type=int, help="its checkpoint to use (default: the newest)")
    add(
        "--data",
        required=True,
        help="token store of pictures (docs/images.md), or synthetic:shapes[:ROWS[:SEED[:SPLIT]]]",
    )
    add("--out", required=True, help="folder of the new store; gs:// and s3://, too")
    add("--tokenizer", help="of synthetic captions (default: bytes); a store has its own")
    add("--batch-size", type=int, default=256, help="pictures of a compiled step (default: 256)")
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f"--batch-size={args.batch_size}: give a number of at least 1")
    import jax

    from lm.telemetry.progress import Progress
    from lm.training.picture_codes import PictureCoder, write_store

    coder = PictureCoder(args.vqvae, jax.devices(), step=args.step, batch_size=args.batch_size)
    progress = Progress()
    manifest = write_store(
        coder,
        args.data,
        args.out,
        tokenizer=args.tokenizer,
        report=lambda done, count: progress.show(f"encoding · picture {done:,}/{count:,}"),
    )
    progress.clear()
    codes = manifest["codes"]
    print(
        f"{manifest['num_documents']:,} pictures as {codes['grid_size']} x {codes['grid_size']} of "
        f"{codes['num_codes']:,} codes in {args.out}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
