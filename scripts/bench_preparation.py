"""Measure a preparation: documents per second, peak memory of each process, and equal bytes.

    python scripts/bench_preparation.py --documents=10000000 --workers=1,2,7 --kills=3

It makes short synthetic documents, of which a tenth are repetitions, in OUT/text, and prepares them
with each number of workers, each time killed --kills times with SIGKILL and started again.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from lm import cli

FILES = 16
SCRIPT = Path(__file__).with_name("prepare_data.py")


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=200_000, help="default: 200,000")
    parser.add_argument("--workers", type=cli.list_of(int), default=[1, 2], help="default: 1,2")
    parser.add_argument("--kills", type=int, default=0, help="of each preparation (default: 0)")
    parser.add_argument("--tokenizer", default="bytes", help="default: bytes")
    parser.add_argument("--out", default="data/bench_preparation", type=cli.local_path)
    flags = parser.parse_args()
    out = Path(flags.out)
    make_documents(out / f"text-{flags.documents}", flags.documents)
    hashes = {}
    for workers in flags.workers:
        for kills in dict.fromkeys((0, flags.kills)):
            hashes[workers, kills] = prepare(flags, out, workers, kills)
            print(f"  {hashes[workers, kills]}", flush=True)
    differing = len(set(map(str, hashes.values()))) - 1
    print(f"{differing} of {len(hashes)} preparations differ from the first")
    return int(differing > 0)


def make_documents(folder: Path, count: int) -> None:
    """Write `count` lines of some 60 bytes into `FILES` files, unless they are there."""
    if folder.exists():
        return
    rng, partial = np.random.default_rng(0), folder.with_suffix(".partial")
    partial.mkdir(parents=True)
    words = np.array([f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("n", "rt", "st")])
    for number in range(FILES):
        with open(partial / f"{number:02d}.jsonl", "w") as file:
            for start in range(number * count // FILES, (number + 1) * count // FILES, 10_000):
                size = min(10_000, (number + 1) * count // FILES - start)
                repeated = rng.integers(0, count // 20 + 1, size)
                numbers = np.where(rng.random(size) < 0.1, -repeated, start + np.arange(size))
                chosen = words[rng.integers(0, len(words), (size, 9))].tolist()
                for i, text in zip(numbers.tolist(), chosen, strict=True):
                    text = " ".join(text) if i > 0 else "a document that is here twice or so"
                    file.write(f'{{"text": "{text} {i}"}}\n')
    partial.rename(folder)


def prepare(flags: argparse.Namespace, out: Path, workers: int, kills: int) -> dict[str, str]:
    """Prepare the documents once; return the hashes of the stores."""
    stores = out / f"{workers}-workers-{kills}-kills"
    shutil.rmtree(stores, ignore_errors=True)
    command = [sys.executable, str(SCRIPT), f"--data={out / f'text-{flags.documents}'}"]
    command += [f"--tokenizer={flags.tokenizer}", f"--out={stores}", f"--workers={workers}"]
    start, rng = time.monotonic(), random.Random(workers)
    own, of_workers = {}, {}  # peak memory by process, in MB
    limit = max(flags.documents / 20_000 / workers, 4.0)  # seconds, in which a kill falls
    for kill in range(kills + 1):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + (rng.uniform(1, limit) if kill < kills else float("inf"))
        while process.poll() is None and time.monotonic() < until:
            record_peaks(process.pid, own, of_workers)
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        if process.wait() > 0:
            raise ValueError(f"{' '.join(command)} ended with {process.returncode}")
    seconds = time.monotonic() - start
    most = max(of_workers.values(), default=0)
    print(
        f"{flags.documents:,} documents, {workers} workers, {kills} kills: {seconds:.0f} s, "
        f"{flags.documents / seconds:,.0f} documents/s; peak memory {max(own.values()):,.0f} MB, "
        f"of workers at most {most:,.0f} MB"
    )
    files = {split: stores / split / "manifest.json" for split in ("train", "validation")}
    return {s: json.loads(file.read_text())["content_hash"][:16] for s, file in files.items()}


def record_peaks(pid: int, own: dict[int, float], of_children: dict[int, float]) -> None:
    """Record the peak memory of a process and of its children, in MB."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for process in (pid, *map(int, children)):
            status = Path(f"/proc/{process}/status").read_text()
            if found := re.search(r"VmHWM:\s*(\d+)", status):
                peaks = own if process == pid else of_children
                peaks[process] = int(found[1]) / 1024
    except (FileNotFoundError, ProcessLookupError):
        return


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cli.run(main)
