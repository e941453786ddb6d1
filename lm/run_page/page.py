"""The page itself: one HTML file with all of its data, styles and code. Its content security policy
lets it reach no network.

Curves are drawn by Plotly's bundle out of the pip package `plotly` (MIT): it has zoom, heat maps
and parallel coordinates, is kept by a company, and needs no copy in this repository. Compressed, as
the page stores it and as browsers have unpacked such since 2023 (`DecompressionStream`), it takes
1.9 of its 4.7 MB. The data is stored likewise, in base64, and shown as text alone: nothing in a
prompt, a path or an error can close a tag.
"""

from __future__ import annotations

import base64
import datetime
import functools
import gzip
import html
import importlib.resources
import re
import sys
from collections.abc import Sequence
from typing import Any

from lm.exit_codes import Exit
from lm.run_page import charts, content, thinning, trials
from lm.run_page.folder import RunFolder, is_sweep
from lm.storage.files import write_atomically
from lm.telemetry import jsonl

REPORT_FILE = "report.html"
MAX_WHOLE = 12  # runs whose heat maps, samples and checkpoints are on a page
MAX_CURVES = 60  # runs whose curves are on a page: those of lowest loss
# Ends after which the folder is this process's own and answers, and no launcher waits for it.
ENDS = (
    Exit.SUCCESS,
    Exit.OUT_OF_DATA,
    Exit.DIVERGED,
    Exit.CORRUPT,
    Exit.MISMATCH,
    Exit.NO_PROGRESS,
)
_MARK = re.compile(r"<!--(\w+)-->")


def make(workdirs: Sequence[str]) -> str:
    """The page of runs, or of the runs of a single sweep's folder.

    Raises:
        NoRun: a folder holds no run, or a sweep none yet.
    """
    sweep = workdirs[0] if len(workdirs) == 1 and is_sweep(workdirs[0]) else None
    runs = [RunFolder(path) for path in (trials.folders(sweep) if sweep else workdirs)]
    for run in runs:
        run.check()
    return render(_page(sweep, runs))


def _page(sweep: str | None, runs: Sequence[RunFolder]) -> dict[str, Any]:
    whole, count = len(runs) <= MAX_WHOLE, len(runs)
    compared = trials.of_sweep(sweep, runs) if sweep else None
    runs = sorted(runs, key=content.final_loss)[:MAX_CURVES] if count > MAX_CURVES else runs
    buckets = max(80, thinning.BUCKETS // max(1, len(runs) // 2))
    found = [content.of_run(run, buckets, whole=whole) for run in runs]
    _name_apart(found)
    explained: dict[str, Any] = {}
    for run in runs:
        explained = content.explained(run.config) | explained
    names = [run["name"] for run in found]
    title = RunFolder(sweep).name if sweep else ", ".join(names[:3]) + " …" * (len(names) > 3)
    return {
        "title": title,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "count": count,
        "charts": charts.described(id for run in found for id in run["charts"]),
        "explained": explained,
        "runs": found,
        "sweep": compared,
    }


def _name_apart(runs: Sequence[dict[str, Any]]) -> None:
    """Give runs of one name their paths as names."""
    names = [run["name"] for run in runs]
    for run in runs:
        if names.count(run["name"]) > 1:
            run["name"] = run["workdir"]


def render(page: dict[str, Any]) -> str:
    """HTML of the page's data."""
    parts = {
        "title": html.escape(page["title"]),
        "style": _resource("page.css"),
        "data": _packed(jsonl.dumps(page, separators=(",", ":")).encode()),
        "plotly": _plotly(),
        "script": _resource("elements.js") + _resource("curves.js") + _resource("page.js"),
    }
    # one pass, so that a mark in the data stays what it is
    return _MARK.sub(lambda match: parts.get(match[1], match[0]), _resource("page.html"))


def _resource(name: str) -> str:
    return (importlib.resources.files("lm.run_page") / name).read_text()


@functools.cache
def _plotly() -> str:
    bundle = importlib.resources.files("plotly") / "package_data" / "plotly.min.js"
    return _packed(bundle.read_bytes())


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()


def write(workdirs: Sequence[str], out: str | None = None) -> str:
    """Write the page and return its path: OUT, or report.html in the run's or sweep's folder.

    Raises:
        ValueError: several runs and no `out`.
    """
    if out is None:
        if len(workdirs) > 1:
            raise ValueError("--out=FILE is needed for a page of several runs")
        out = f"{workdirs[0]}/{REPORT_FILE}"
    write_atomically(out, make(workdirs).encode())
    return out


def write_at_end(workdir: str, code: int = Exit.SUCCESS) -> None:
    """Write the page of a run or sweep that has ended with an exit code, if that is one of `ENDS`.

    Where it can't be written, say so and go on: a page is no reason for a run to fail.
    """
    if code not in ENDS:
        return
    try:
        print(f"page: {write([workdir])}")
    except Exception as error:
        print(f"no {REPORT_FILE}: {type(error).__name__}: {error}", file=sys.stderr)
