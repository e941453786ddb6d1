"""A store of 1e9 documents, of sparse and linked files, is opened and read as a small one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lm.data.bins import Packing, make_plan
from lm.data.plans import plan_entry, to_bytes
from lm.data.store_files import BLOCK
from lm.preparation.token_writer import write_store
from lm.tokenizers.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[1]
SHARDS, DOCUMENTS, TOKENS = 250, 4_000_000, 256  # of each shard, of each document
PACKING = Packing(("text",), (2048,))
PROGRAM = """
import re, sys, time, numpy as np

def resident():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024

from lm.config.schema import DataConfig, LoaderConfig
from lm.data.pipeline import make_pipeline
from lm.data.rows import RowLayout
from lm.tokenizers.tokenizer import ByteTokenizer

class Objective:
    layout = RowLayout((2048,))
    def for_source(self, source):
        return self
    def __call__(self, rows, rng):
        from lm.types import HostBatch, HostTokens
        tokens = HostTokens(rows.ids, rows.segments, rows.positions, None)
        return HostBatch(tokens, rows.ids, np.ones(rows.ids.shape, np.float32))

before, start = resident(), time.perf_counter()
config = DataConfig(train=(sys.argv[1],), packing=sys.argv[2])
pipeline = make_pipeline(config, Objective(), ByteTokenizer(), batch_size=64, seed=0)
print(time.perf_counter() - start, resident())
times = []
for step in range(10**6, 10**6 + 20):
    start = np.array([time.perf_counter(), time.thread_time()])
    pipeline.batch_at(step)
    times.append([time.perf_counter(), time.thread_time()] - start)
print(*np.median(times, 0))
print(before, resident())
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """250 shards of 4 million documents of 256 tokens: 512 GB of tokens, most of them holes."""
    path = tmp_path_factory.mktemp("large") / "store"
    write_store(path, [], ByteTokenizer())
    manifest = json.loads((path / "manifest.json").read_text())
    offsets = np.arange(DOCUMENTS + 1) * TOKENS
    plan = make_plan(PACKING, [offsets])
    real = {  # of all shards the same
        "text/offsets.bin": offsets.tobytes(),
        "text/index.bin": offsets[::BLOCK].tobytes(),
        f"{PACKING.name}.bin": to_bytes(plan),
    }
    holes = {"text/tokens.bin": 2 * DOCUMENTS * TOKENS, "text/bytes.bin": 8 * DOCUMENTS}
    holes |= {"ids.bin": 0, "id_offsets.bin": 8 * (DOCUMENTS + 1)}
    sizes = holes | {name: len(content) for name, content in real.items()}
    for name, content in real.items():
        (path / "shared" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "shared" / name).write_bytes(content)
    counts = {"num_tokens": DOCUMENTS * TOKENS, "num_bytes": DOCUMENTS * TOKENS}
    manifest["shards"] = []
    for number in range(SHARDS):
        folder = path / f"shard-{number:05d}"
        (folder / "text").mkdir(parents=True, exist_ok=True)
        for name in real:
            (folder / name).unlink(missing_ok=True)
            os.link(path / "shared" / name, folder / name)
        for name, size in holes.items():
            with open(folder / name, "wb") as file:
                file.truncate(size)
        manifest["shards"].append({
            "name": folder.name,
            "num_documents": DOCUMENTS,
            "fields": {"text": counts},
            "plans": {PACKING.name: plan_entry(plan)},
            "files": {name: {"size": size, "sha256": "0" * 64} for name, size in sizes.items()},
        })  # fmt: skip
    manifest["num_documents"] = SHARDS * DOCUMENTS
    manifest["fields"]["text"] = {key: SHARDS * count for key, count in counts.items()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_a_store_of_1e9_documents_opens_in_a_second_and_200_megabytes(store, packing, capsys):
    command = [sys.executable, "-c", PROGRAM, str(store), packing]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    opened, times, resident = (line.split() for line in run.stdout.splitlines())
    with capsys.disabled():
        print(
            f"\n{packing}: {SHARDS * DOCUMENTS:.0e} documents opened in {float(opened[0]):.2f} s; "
            f"batch_at: median {1e3 * float(times[0]):.0f} ms, of them {1e3 * float(times[1]):.0f} "
            f"ms of a processor; resident "
            f"{float(resident[0]):.0f} MB with imports alone, {float(opened[1]):.0f} MB opened, "
            f"{float(resident[1]):.0f} MB after the batches"
        )
    assert float(opened[0]) < 1 and float(opened[1]) < 200
    assert float(times[1]) < 0.05  # the rest is other work of the machine
    assert float(resident[1]) - float(resident[0]) < 50
