"""Scaling laws from a table of runs: constants with intervals, a held-out largest size, pictures.

    python scripts/fit_scaling_law.py --table=docs/ladder.csv --counting=total \\
        --out=scaling.json --pictures=pictures

The table is a CSV, JSONL or Parquet file with a row for each finished run and the columns
parameters (or non_embedding_parameters), tokens, flops and loss in nats per token; --columns says
how they are called elsewhere. Optional columns: learning_rate and batch_size, whose best values get
laws of their own; unique_tokens, for --repeats; status, of which only "finished" counts.

Of every size and token count the best setting is fitted. Methods: the envelope, IsoFLOP parabolas
and the parametric law of arXiv:2203.15556; repeated data by arXiv:2305.16264. The law without the
largest size predicts it, before all sizes are fitted. scripts/plan_compute.py plans from the JSON.
"""

from __future__ import annotations

from pathlib import Path

from lm import cli


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--table", required=True, metavar="FILE", help="a .csv, .jsonl or .parquet file")
    add("--counting", required=True, choices=("total", "non_embedding"), help="what N counts")
    add(
        "--out",
        type=cli.local_path,
        metavar="FILE",
        default="scaling.json",
        help="the artefact (default: %(default)s)",
    )
    add(
        "--pictures",
        type=cli.local_path,
        metavar="FOLDER",
        help="where to put the pictures, if anywhere",
    )
    add("--columns", default="", help="parameters=NAME,loss=NAME,...: their names in the table")
    add("--drop-non-finite", action="store_true", help="leave out runs that diverged")
    add("--vocab-size", type=int, help="refuse losses above its logarithm")
    add("--repeats", default="none", help="none, fit, or R* of repeated data (default: none)")
    add("--delta", type=float, default=1e-3, help="of the Huber loss (default: %(default)s)")
    add("--level", type=float, default=0.9, help="of the intervals (default: %(default)s)")
    add("--replicates", type=int, default=400, help="of the bootstrap (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    add(
        "--setting-variable",
        default="flops",
        choices=("parameters", "tokens", "flops"),
        help="what learning rate and batch size are laws of (default: %(default)s)",
    )
    args = parser.parse_args()

    from lm.scaling import analysis, artefact, report, table

    options = artefact.Options(
        delta=args.delta,
        repeats=_repeats(args.repeats),
        fits_repeats=args.repeats == "fit",
        level=args.level,
        num_replicates=args.replicates,
        seed=args.seed,
        variable=args.setting_variable,
    )
    runs, source = table.read(
        args.table,
        counting=args.counting,
        columns=_columns(args.columns),
        drop_non_finite=args.drop_non_finite,
        vocab_size=args.vocab_size,
    )
    result = analysis.analyse(runs, source, options)
    print(report.fit_page(result))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(artefact.to_json(result))
    print(f"artefact: {args.out}")
    if args.pictures:
        from lm.scaling import figures

        folder = Path(args.pictures)
        folder.mkdir(parents=True, exist_ok=True)
        made = figures.every_figure(runs.best(), result)
        for name in figures.FIGURES:
            path = folder / f"{name}.png"
            if name in made:
                made[name].savefig(path, dpi=120)
            else:
                path.unlink(missing_ok=True)  # of an earlier fit
        print(f"pictures: {', '.join(str(folder / f'{name}.png') for name in sorted(made))}")
    return 0


def _repeats(text: str) -> float | None:
    """R* of --repeats, if it is a number."""
    try:
        return None if text in ("none", "fit") else float(text)
    except ValueError:
        raise ValueError(f"--repeats={text}: none, fit or a number such as 15.4") from None


def _columns(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    wrong = [name for name, _, column in pairs if not column]
    if wrong:
        raise ValueError(f"--columns={text}: {wrong[0]} has no name after '='")
    return {name: column for name, _, column in pairs}


if __name__ == "__main__":
    cli.run(main)
