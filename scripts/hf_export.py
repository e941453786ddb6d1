"""Write the newest checkpoint of a run as a folder that `transformers` loads.

    python scripts/hf_export.py --workdir=runs/mine --out=exports/mine
    python scripts/hf_export.py --workdir=runs/mine --out=exports/mine --dtype=bfloat16

The folder gets config.json, model.safetensors (in shards of at most 5 GB, with an index) and the
tokenizer: `AutoModelForCausalLM` and `AutoTokenizer.from_pretrained` take it. The parameters are
those that training evaluates (averaged ones where it keeps them). The family is the first one that
can hold the model; where config.model says something that no family has, all of it is listed.

--weights=int8 or int4 writes the matrices inside the layers in compressed-tensors' format, which
`transformers` reads with that package installed; the numbers are those of lm generate --weights.

A tokenizer that came with an import leaves as it came. One of this project's own puts its bos
before a text, as training did.
"""

from __future__ import annotations

from lm import cli
from lm.compression import flags


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--workdir", type=cli.folder, required=True, help="folder of the run")
    add("--out", type=cli.folder, required=True, help="folder to write; must be new or empty")
    add("--step", type=int, help="checkpoint to use (default: the newest)")
    add("--family", help="a model_type: llama, say (default: the first that can hold the model)")
    add(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="type of the tensors; default: float32, which keeps every bit",
    )
    flags.add_flags(parser)
    args = parser.parse_args()

    import jax

    from lm.hf.exporting import export_folder
    from lm.training.restore import restore_params
    from lm.training.stored_run import load

    experiment = load(args.workdir, jax.devices()[:1])
    _, params = restore_params(experiment, args.workdir, args.step)
    export_folder(
        experiment,
        params,
        args.out,
        family=args.family,
        dtype=args.dtype,
        weights=flags.weight_format(args),
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
