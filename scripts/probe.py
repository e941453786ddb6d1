"""Probe a run for social bias, canaries, verbatim memorization and membership of its data.

    python scripts/probe.py --workdir=runs/tiny-stdlib --probe=bias,memorization,membership
    python scripts/probe.py --workdir=runs/tiny-stdlib --probe=bias --winobias=WinoBias/wino/data \\
        --crows-pairs=crows_pairs_anonymized.csv
    python scripts/probe.py --workdir=runs/planted --probe=canaries,membership \\
        --canaries=data/canaries/canaries.json

For causal models. Prints the report, and writes it to probes.json, probes.md and probes.png in
WORKDIR/probes, or --out. All figures have 95% intervals and are functions of the flags.
No text of the data or of a canary is shown: memorized sequences are named by document and offset.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lm import cli

if TYPE_CHECKING:
    import numpy as np

    from lm.probes.canaries import CanarySet
    from lm.probes.tables import Table
    from lm.tokenizers.tokenizer import Tokenizer
    from lm.training.experiment import Experiment
    from lm.types import Device, Params

PROBES = ("bias", "canaries", "memorization", "membership")


def main() -> int:
    args = parse_args()
    import jax

    from lm.probes import report

    step, tables = measure(args, jax.devices())
    head = {"run": args.workdir, "step": step, "seed": args.seed}
    if args.reference:
        head["reference"] = args.reference
    out = args.out or f"{args.workdir.rstrip('/')}/probes"
    print(report.write(out, head, tables))
    print(f"written to {out}: {report.JSON}, {report.PAGE}, {report.PLOT}")
    return 0


def measure(args: argparse.Namespace, devices: Sequence[Device]) -> tuple[int, list[Table]]:
    """(step of the checkpoint, the tables of all probes), on these devices."""
    run = Run.load(args.workdir, args.step, devices, "--workdir")
    return run.step, [table for name in args.probe for table in MAKERS[name](args, run)]


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    add, names = parser.add_argument, cli.list_of(str)
    add("--workdir", type=cli.folder, required=True, help="folder of the run")
    add("--probe", type=names, required=True, help=f"of {','.join(PROBES)}")
    add("--step", type=int, help="checkpoint to use (default: the newest)")
    add("--out", type=cli.folder, help="folder of the report (default: WORKDIR/probes)")
    add("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    add("--languages", type=names, help="bias: of the templates (default: en,zh)")
    add("--crows-pairs", metavar="FILE", help="bias: crows_pairs_anonymized.csv")
    add("--winobias", metavar="FOLDER", help="bias: with pro_stereotyped_type1.txt.dev and so on")
    add("--canaries", metavar="FILE", help="canaries, membership: the key of plant_canaries.py")
    add("--candidates", type=int, default=2000, help="canaries: random texts of the format")
    add("--data", action="append", help="training store in place of the run's; repeatable")
    add("--validation", action="append", help="held-out store in place of the run's; repeatable")
    add("--count", type=int, default=1000, help="sequences drawn of each store")
    lengths = cli.list_of(int)
    add("--prompt-lengths", type=lengths, default=[8, 16, 32], help="memorization: in tokens")
    add("--continuation", type=int, default=16, help="memorization: tokens to reproduce")
    add("--length", type=int, help="membership: tokens of a sequence (default: of a row)")
    add("--reference", metavar="RUN", help="membership: a run whose losses are subtracted")
    args = parser.parse_args()
    if wrong := [name for name in args.probe if name not in PROBES]:
        parser.error(f"--probe={wrong[0]}: there are {', '.join(PROBES)}")
    if "canaries" in args.probe and not args.canaries:
        parser.error("--probe=canaries needs --canaries=FILE, the key of lm plant-canaries")
    for name, low in (("count", 1), ("candidates", 10), ("continuation", 1), ("length", 1)):
        value = getattr(args, name)
        if value is not None and value < low:
            parser.error(f"--{name}={value}: give a number of at least {low}")
    return args


@dataclasses.dataclass(frozen=True)
class Run:
    """The model of a checkpoint."""

    experiment: Experiment
    devices: Sequence[Device]
    step: int
    params: Params

    @classmethod
    def load(cls, workdir: str, step: int | None, devices: Sequence[Device], flag: str) -> Run:
        """Raises ValueError where the run's model is not a causal one of texts."""
        from lm.config import conversion
        from lm.training.restore import restore_params
        from lm.training.stored_run import load

        experiment = load(workdir, devices)
        model, objective = experiment.config.model, experiment.objective
        names = conversion.names(experiment.config_dict)
        about = f"{flag}={workdir}: probes need a causal model of texts, "
        if not model.is_causal or model.takes_encoder:
            raise ValueError(f"{about}and config.model.name={names['model']} is none")
        if objective.pairs is not None or objective.layout.fields != ("text",):
            raise ValueError(f"{about}and config.objective.name={names['objective']} trains none")
        return cls(experiment, devices, *restore_params(experiment, workdir, step))

    @property
    def tokenizer(self) -> Tokenizer:
        return self.experiment.tokenizer

    @property
    def parts(self) -> tuple[Any, Any, Any]:
        """Arguments of a scorer and a generator."""
        return self.experiment.model, self.params, self.tokenizer

    def stores(self, given: Sequence[str] | None, split: str) -> tuple[str, ...]:
        """The paths that a flag gives, else those of the run's config.

        Raises:
            ValueError: there are none.
        """
        flag = {"train": "--data", "validation": "--validation"}[split]
        found = tuple(given or getattr(self.experiment.config.data, split))
        if not found:
            raise ValueError(f"config.data.{split} of this run is empty: give {flag}=STORE")
        return found


def bias(args: argparse.Namespace, run: Run) -> list[Table]:
    from lm.generation.score import Scorer
    from lm.probes import bias, bias_files, bias_templates

    languages = args.languages or bias_templates.LANGUAGES
    if wrong := set(languages) - set(bias_templates.LANGUAGES):
        raise ValueError(f"--languages={wrong.pop()}: there are {bias_templates.LANGUAGES}")
    files = []
    if args.crows_pairs:
        files.append(("CrowS-Pairs", bias_files.read_crows_pairs(args.crows_pairs), 0))
    if args.winobias:
        files.append(("WinoBias", *bias_files.read_winobias(args.winobias)))
    scorer, tables = Scorer(*run.parts), []
    tests = [test for test in bias_templates.TESTS if test.language in languages]
    with reported("bias, templates") as report:
        tables.append(bias.of_templates(scorer, tests, seed=args.seed, report=report))
    for name, pairs, skipped in files:
        with reported(f"bias, {name}") as report:
            options = {"skipped": skipped, "seed": args.seed, "report": report}
            tables.append(bias.of_pairs(scorer, name, pairs, **options))
    return tables


def canaries(args: argparse.Namespace, run: Run) -> list[Table]:
    from lm.generation.generator import Generator
    from lm.generation.score import Scorer
    from lm.probes import canaries

    with reported("canaries") as report:
        table = canaries.probe(
            Scorer(*run.parts),
            Generator(*run.parts),
            canaries.read_key(args.canaries),
            num_candidates=args.candidates,
            seed=args.seed,
            report=report,
        )
    return [table]


def memorization(args: argparse.Namespace, run: Run) -> list[Table]:
    from lm.generation.generator import Generator
    from lm.probes import memorization, sequences

    generator, tables = Generator(*run.parts, start=(), stop_ids=()), []
    for path in run.stores(args.data, "train"):
        store = sequences.open_store(path, run.tokenizer, "--data")
        with reported(f"memorization of {path}") as report:
            tables += memorization.probe(
                generator,
                store,
                prompt_lengths=args.prompt_lengths,
                length=args.continuation,
                count=args.count,
                seed=args.seed,
                report=report,
            )
    return tables


def membership(args: argparse.Namespace, run: Run) -> list[Table]:
    import numpy as np

    from lm.probes import membership
    from lm.probes.canaries import read_key

    runs = [run]
    if args.reference:
        runs.append(Run.load(args.reference, None, run.devices, "--reference"))
        if runs[1].tokenizer.fingerprint != run.tokenizer.fingerprint:
            raise ValueError(f"--reference={args.reference} has another tokenizer than the run")
    c = [r.experiment.config for r in runs]
    longest = min(x.model.max_length for x in c)
    length = args.length or min(c[0].data.length, longest)
    if length > longest:
        raise ValueError(f"--length ({length}) must be at most config.model.max_length ({longest})")
    note = f"Sequences of at most {length} tokens by their loss a token"
    note += ", less that of the reference." if args.reference else "."
    tables, unit = [], "nats a token"
    if not args.canaries or args.data or args.validation or run.experiment.config.data.validation:
        train, held_out = (
            {path: _losses(args, runs, path, length, flag) for path in run.stores(given, split)}
            for split, given, flag in (
                ("train", args.data, "--data"),
                ("validation", args.validation, "--validation"),
            )
        )
        others = np.concatenate([*held_out.values()])
        found = membership.rows(train, others, seed=args.seed)
        tables.append(membership.table("Membership of training data", found, unit, note))
    if args.canaries:
        key = read_key(args.canaries)
        tables.append(_canary_membership(args, runs, key))
    return tables


def _losses(
    args: argparse.Namespace, runs: Sequence[Run], path: str, length: int, flag: str
) -> np.ndarray:
    """float64 [n]: of sequences of a store; the reference's, if there is one, are subtracted."""
    from lm.generation.score import Scorer
    from lm.probes import membership, sequences

    store = sequences.open_store(path, runs[0].tokenizer, flag)
    options = {"length": length, "count": args.count, "seed": args.seed}
    drawn = sequences.draw_blocks(store, runs[0].tokenizer, **options)
    if not drawn:
        raise ValueError(f"{flag}={path} has no documents to draw from")
    return _less(
        runs,
        lambda run, report: membership.losses(Scorer(*run.parts, start=()), drawn, report=report),
        f"membership, {path}",
    )


def _canary_membership(args: argparse.Namespace, runs: Sequence[Run], key: CanarySet) -> Table:
    """Canaries of every count against candidates of their format."""
    import numpy as np

    from lm.generation.score import Scorer
    from lm.probes import canaries, membership

    drawn, counts = key.candidates(args.candidates), np.array([c.planted for c in key.canaries])
    texts = [*(c.text for c in key.canaries), *drawn]
    values = _less(
        runs,
        lambda run, report: canaries.log_perplexities(Scorer(*run.parts), texts, report=report),
        "membership, canaries",
    )
    own, others = values[: len(counts)], values[len(counts) :]
    members = {f"planted {n} times": own[counts == n] for n in sorted(set(counts.tolist()))}
    found = membership.rows(members, others, seed=args.seed)
    note = "Canaries by log-perplexity against random texts of their format, which are nowhere"
    note += ", less that of the reference." if args.reference else "."
    return membership.table(f"Membership of canaries `{key.masked}`", found, "bits", note)


def _less(runs: Sequence[Run], measure: Callable[[Run, Any], np.ndarray], name: str) -> np.ndarray:
    """The values of the first run, less those of the second one if there is one."""
    found = []
    for run in runs:
        with reported(name) as report:
            found.append(measure(run, report))
    return found[0] - found[1] if len(found) > 1 else found[0]


@contextlib.contextmanager
def reported(name: str) -> Iterator[Callable[[int, int], None]]:
    """A function that shows progress, (done, count), and a screen without it afterwards."""
    from lm.telemetry.progress import Progress

    progress = Progress()
    yield lambda done, count: progress.show(f"{name} · {done}/{count}")
    progress.clear()


MAKERS = {
    "bias": bias,
    "canaries": canaries,
    "memorization": memorization,
    "membership": membership,
}


if __name__ == "__main__":
    cli.run(main)
