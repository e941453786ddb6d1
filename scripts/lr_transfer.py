"""The best learning rate at every width, under mup and the standard parametrization.

    python scripts/lr_transfer.py --config=configs/transfer.py --widths=64,128,256,512 \\
        --rates=-9,-8,-7,-6,-5 --seeds=0,1,2 --out=runs/transfer

The config is the base model. Each run is appended to OUT.jsonl when it is done, and not done twice:
after a kill the same command goes on. Ends with OUT.png and a table.
"""

from __future__ import annotations

from pathlib import Path

from lm import cli


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_config()
    add, ints, names = parser.add_argument, cli.list_of(int), cli.list_of(str)
    add("--widths", type=ints, default=[64, 128, 256, 512], help="values of embed_dim")
    add("--rates", type=cli.list_of(float), default=[*range(-9, -4)], help="as powers of two")
    add("--seeds", type=ints, default=[0, 1, 2], help="seeds of weights and data")
    add("--parametrizations", type=names, default=["mup", "standard"], help="those to compare")
    add(
        "--out",
        type=cli.local_path,
        default="transfer",
        help="where the results go, without an ending",
    )
    args = parser.parse_args()
    import jax

    from lm.scaling import lr_transfer

    runs = lr_transfer.sweep(
        args.config,
        jax.devices(),
        Path(f"{args.out}.jsonl"),
        parametrizations=args.parametrizations,
        widths=args.widths,
        rates=[2.0**rate for rate in args.rates],
        seeds=args.seeds,
    )
    print(lr_transfer.table(lr_transfer.best(runs)))
    lr_transfer.draw(runs, f"{args.out}.png")
    print(f"{args.out}.png, {args.out}.jsonl")
    return 0


if __name__ == "__main__":
    cli.run(main)
