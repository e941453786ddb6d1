"""Evaluate the newest checkpoint of a run on its validation stores, or on others.

    python scripts/evaluate.py --workdir=runs/tiny-stdlib
    python scripts/evaluate.py --workdir=runs/tiny-stdlib --data=data/other/validation
    python scripts/evaluate.py --workdir=runs/tiny-stdlib --weights=int4 --group=64

    python scripts/evaluate.py --workdir=runs/gpt2 --evaluations=all --step=20000

    python scripts/evaluate.py --workdir=runs/dalle --drawings=314 --guidance=2
    python scripts/evaluate.py --workdir=runs/vqvae --reconstructions=picture.png

Prints one JSON line for every store: loss in nats per token, perplexity, bits per byte, accuracy.
Sums are added up before the one division, so the figures don't depend on batch size or devices.

With --evaluations the lines are those of the evaluations inside the run, config.evaluations, by
their names (or all), as the run writes them to evaluations.jsonl, whole whatever their budget.

With --weights=int8 or int4 the matrices lie in memory in 8 or 4 bits, and the loss is what they
cost.

With --drawings=N a run of config.objective.name=dalle draws held-out prompts of synthetic:shapes,
and the line has the share of pictures that show the colours, shapes and places of their prompts.
With --reconstructions=FILE.png a run of config.objective.name=vqvae writes pictures of its first
store, each above its reconstruction; the line has their error, in dB as psnr, and the codes in use.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lm import cli
from lm.compression import flags
from lm.storage.paths import expand_path
from lm.telemetry import jsonl

if TYPE_CHECKING:
    from lm.training.experiment import Experiment


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=cli.folder, required=True, help="folder of the run")
    parser.add_argument(
        "--data", action="append", help="token store to use instead of the run's; repeatable"
    )
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest)")
    parser.add_argument("--batch-size", type=int, help="rows in a batch (default: as in training)")
    parser.add_argument(
        "--length",
        type=int,
        help="tokens in a row, which nothing before it is known of (default: as in training)",
    )
    parser.add_argument(
        "--no-bos",
        action="store_true",
        help="put no bos before documents, whose first tokens are then not scored: for weights "
        "trained so (GPT-2, Qwen); there are no bits per byte",
    )
    parser.add_argument(
        "--evaluations",
        type=lambda text: text.split(","),
        metavar="NAMES",
        help="all, or names in config.evaluations with commas between them: run these",
    )
    flags.add_flags(parser)
    parser.add_argument("--drawings", type=int, metavar="N", help="prompts to draw and check")
    parser.add_argument(
        "--guidance", type=float, default=1.0, metavar="S", help="--drawings: as of generate.py"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="--drawings: as of generate.py"
    )
    parser.add_argument("--vqvae", metavar="RUN", help="--drawings: as of generate.py")
    parser.add_argument(
        "--reconstructions", metavar="FILE.png", help="pictures above what a VQ-VAE makes of them"
    )
    args = parser.parse_args()
    if args.reconstructions is not None:
        if args.drawings is not None:
            parser.error("--reconstructions is for a VQ-VAE, --drawings for a decoder of its codes")
        if not args.reconstructions.lower().endswith(".png"):
            parser.error(f"--reconstructions={args.reconstructions}: pictures are written as .png")
        args.reconstructions = expand_path(args.reconstructions, "--reconstructions")
    if args.evaluations and (args.drawings is not None or args.reconstructions is not None):
        parser.error("--evaluations are of the run's config, others have flags of their own")
    if args.drawings is not None:
        if args.drawings < 1:
            parser.error(f"--drawings={args.drawings}: give a number of at least 1")
        return _draw(args)

    changes, names = {}, {}
    if args.data:
        changes["data.validation"] = tuple(args.data)
        names["config.data.validation"] = "--data"
    if args.length is not None:
        changes["data.length"] = args.length
        names["config.data.length"] = "--length"
    if args.batch_size is not None:
        changes |= {"data.batch_size": args.batch_size, "data.batch_size_per_device": None}
        names["config.data.batch_size"] = "--batch-size"
    with cli.named_by_flags(names):
        _evaluate(args, changes)
    return 0


def _draw(args: argparse.Namespace) -> int:
    """Print the figures of drawings."""
    import jax

    from lm.config import conversion
    from lm.evaluation.drawings import evaluate_drawings
    from lm.generation.pictures import Painter
    from lm.generation.sampling import Sampling
    from lm.telemetry.progress import Progress
    from lm.training.picture_codes import coder_of
    from lm.training.restore import restore_params
    from lm.training.stored_run import load

    sampling = Sampling(temperature=args.temperature)
    experiment = load(args.workdir, jax.devices())
    if (name := conversion.names(experiment.config_dict)["objective"]) != "dalle":
        raise ValueError(f"--drawings is for config.objective.name=dalle, this run's is {name}")
    step, params = restore_params(experiment, args.workdir, args.step)
    params = flags.quantized(args, experiment, params)
    config, interface = experiment.config.objective, experiment.model_interface
    painter = Painter(experiment.model, params, experiment.tokenizer, config, interface)
    coder, progress = coder_of(experiment, args.vqvae, jax.devices()), Progress()
    values = evaluate_drawings(
        painter,
        coder,
        args.drawings,
        sampling=sampling,
        guidance=args.guidance,
        report=lambda done, count: progress.show(f"drawing · picture {done}/{count}"),
    )
    progress.clear()
    print(jsonl.dumps({"step": step, "source": "synthetic:shapes, held_out", **values}))
    return 0


def _evaluate(args: argparse.Namespace, changes: Mapping[str, Any]) -> None:
    """Print the figures of every store, with the run's config changed so."""
    import jax

    from lm.config import conversion
    from lm.telemetry.progress import Progress
    from lm.training.evaluation import evaluate
    from lm.training.restore import restore_params
    from lm.training.stored_run import load

    experiment = load(args.workdir, jax.devices(), changes)
    if args.evaluations:
        _run_evaluations(args, experiment)
        return
    if not experiment.config.data.validation:
        raise ValueError(
            f"config.data.validation of {args.workdir} is empty: there is nothing to evaluate on; "
            "name a token store with --data"
        )
    name = conversion.names(experiment.config_dict)["objective"]
    if args.reconstructions is not None and name != "vqvae":
        raise ValueError(
            f"--reconstructions is for config.objective.name=vqvae, this run's is {name}"
        )
    if args.no_bos:
        if name != "causal":
            raise ValueError(f"--no-bos is for config.objective.name=causal, this run's is {name}")
        experiment = experiment.variant({"objective.begins_with_bos": False})
    step, params = restore_params(experiment, args.workdir, args.step)
    params = flags.quantized(args, experiment, params)
    progress = Progress()
    for source, values in evaluate(experiment, params, report=progress.show).items():
        progress.clear()
        print(jsonl.dumps({"step": step, "source": source, **values}, ensure_ascii=False))
    if args.reconstructions is not None:
        from lm.evaluation.reconstructions import write_reconstructions
        from lm.training.picture_codes import PictureCoder

        coder = PictureCoder(args.workdir, jax.devices(), step=step, batch_size=16)
        name, source = next(iter(experiment.validation.items()))
        count = write_reconstructions(args.reconstructions, coder, source)
        print(f"{args.reconstructions}: {count} pictures of {name}, each above its reconstruction")


def _run_evaluations(args: argparse.Namespace, experiment: Experiment) -> None:
    """Print the records of evaluations that the run's config names."""
    from lm.telemetry.progress import Progress
    from lm.training.restore import restore_params
    from lm.training.run_evaluations import RunEvaluations

    known = [*experiment.config.evaluations]
    names = known if args.evaluations == ["all"] else args.evaluations
    unknown = [name for name in names if name not in known]
    if unknown or not known:
        raise ValueError(
            f"--evaluations={','.join(unknown or ['all'])}: config.evaluations of {args.workdir} "
            f"has {', '.join(known) or 'none'}"
        )
    evaluations, progress = RunEvaluations(experiment, names), Progress()
    step, params = restore_params(experiment, args.workdir, args.step)
    params = flags.quantized(args, experiment, params)
    for name in names:
        record = evaluations.run(name, params, step, limited=False, report=progress.show)
        progress.clear()
        print(jsonl.dumps(record, ensure_ascii=False))


if __name__ == "__main__":
    cli.run(main)
