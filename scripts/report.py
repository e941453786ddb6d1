"""Make the page of a run, of several runs side by side, or of a sweep: one HTML file.

    python scripts/report.py runs/tiny                              # runs/tiny/report.html
    python scripts/report.py runs/tiny runs/deeper --out=both.html
    python scripts/report.py runs/rates                             # a sweep's folder

The file holds its data and code, and needs no network. Runs may be in buckets, and may be under
way. scripts/train.py, scripts/pretrain.py and scripts/sweep.py make it at their end.
"""

from __future__ import annotations

from lm import cli


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("workdirs", metavar="RUN", nargs="+", type=cli.folder, help="folder of a run or a sweep")
    add("--out", metavar="FILE", help="the page; default, for a single folder: RUN/report.html")
    args = parser.parse_args()

    from lm.run_page import page

    print(page.write(args.workdirs, args.out))
    return 0


if __name__ == "__main__":
    cli.run(main)
