"""Sizes of activations, and of their change in the first steps, against width or depth.

    python scripts/coord_check.py --config=configs/tiny.py --widths=64,128,256,512 --steps=5 \\
        --out=runs/coordinates

The config is the base model; its schedule is left out. Under mup the exponents of the changes are
near 0; under the standard parametrization they are not. Writes OUT.png and OUT.json.
"""

from __future__ import annotations

from pathlib import Path

from lm import cli
from lm.telemetry import jsonl


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_config()
    add = parser.add_argument
    sizes = parser.add_mutually_exclusive_group(required=True).add_argument
    sizes(
        "--widths", type=cli.list_of(int), help="values of embed_dim, with more heads of one width"
    )
    sizes(
        "--head-dims", type=cli.list_of(int), help="instead: values of embed_dim, with wider heads"
    )
    sizes("--depths", type=cli.list_of(int), help="instead: values of num_layers")
    add("--steps", type=int, default=5, help="steps of training, at least 1")
    add(
        "--parametrizations",
        type=cli.list_of(str),
        default=["mup", "standard"],
        help="those to compare",
    )
    add(
        "--out",
        type=cli.local_path,
        default="coordinates",
        help="where the results go, without an ending",
    )
    args = parser.parse_args()
    given = {"width": args.widths, "head_dim": args.head_dims, "depth": args.depths}
    [along] = [name for name, values in given.items() if values]
    if args.steps < 1:
        parser.error(f"--steps={args.steps} must be at least 1")
    import jax

    from lm.scaling import coord_check

    checks = [
        coord_check.check(
            args.config,
            jax.devices(),
            parametrization=name,
            sizes=given[along],
            num_steps=args.steps,
            along=along,
        )
        for name in args.parametrizations
    ]
    print(coord_check.table(checks))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(jsonl.dumps([found.to_json() for found in checks], indent=1))
    coord_check.draw(checks, f"{out}.png")
    print(f"{out}.png, {out}.json")
    return 0


if __name__ == "__main__":
    cli.run(main)
