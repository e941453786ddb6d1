"""Watch a run in the terminal: progress, loss, speed, goodput, last evaluation, last lines.

    python scripts/watch.py runs/tiny
    python scripts/watch.py gs://bucket/runs/large
    python scripts/watch.py runs/tiny --once | cat

It reads the files of the run's folder alone, so it works beside a run on another machine. It ends
with the run, and by Ctrl-C, which the run does not notice.
"""

from __future__ import annotations

from lm import cli


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("workdir", metavar="RUN", type=cli.folder, help="folder of the run")
    add("--once", action="store_true", help="print one frame and end; so it is in a pipe")
    add("--every", type=float, metavar="SECONDS", help="between two looks; default: 2, buckets 15")
    args = parser.parse_args()
    if args.every is not None and args.every <= 0:
        parser.error(f"--every ({args.every:g}) must be above 0")

    from lm.run_page import watch

    watch.watch(args.workdir, once=args.once, every=args.every)
    return 0


if __name__ == "__main__":
    cli.run(main)
