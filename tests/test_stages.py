"""Stages of a preparation: independent tasks whose stores do not depend on how they are run."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from lm.data.bins import Packing
from lm.data.tokens import TokenStore
from lm.preparation import deduplication, job, prepare, sharding, stages
from lm.preparation import parts as parts_module
from lm.preparation.corpus import Corpus, key_hash
from lm.sources import Skipped


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """2,000 short records in eight files, a fifth of them repetitions, within and across files."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    for i in range(8):
        lines = [
            json.dumps({"text": f"record {n} " * (n % 9 + 1)}) for n in rng.integers(0, 4600, 250)
        ]
        (root / f"{i}.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture
def tiny(monkeypatch):
    """Parts, blocks, runs of keys, buckets, sorted keys and shards of a few documents."""
    monkeypatch.setattr(parts_module, "_MIN_PART", 1)
    monkeypatch.setattr(parts_module, "_MAX_SEEN", 16)
    monkeypatch.setattr(stages, "_BLOCK_DOCUMENTS", 20)
    monkeypatch.setattr(stages, "_KEYS", 30)
    monkeypatch.setattr(job, "_BUCKET_SOURCE", 1 << 15)
    monkeypatch.setattr(deduplication, "_SORTED_KEYS", 16)
    monkeypatch.setattr(sharding, "SHARD_BYTES", 1 << 16)


def run(begun, order=list):
    for stage in stages.stages(begun):
        for i in order(stage.missing()):
            stage.run(i)
        assert stage.missing() == []
    return prepare.finish(begun)


def documents(out, corpus):
    """{(split, id): text}, in the order of the stores."""
    found = {}
    for split in corpus.splits:
        store = TokenStore.open(Path(out) / split)
        store.verify()
        tokenizer = store.tokenizer()
        for i in range(store.num_documents):
            found[split, store.document_ids(i)] = tokenizer.decode(store.document(i))
    return found


@pytest.mark.parametrize("split", ["hash", "tail"])
def test_small_tasks_keep_the_documents_and_counts_of_large_ones(data, tmp_path, split, request):
    corpus = Corpus([str(data)], validation_fraction=0.2, split=split)
    large = prepare.prepare(corpus, tokenizer="bytes", out=tmp_path / "large", num_workers=1)
    request.getfixturevalue("tiny")
    begun = prepare.begin(corpus, tokenizer="bytes", out=tmp_path / "small")
    assert begun.num_parts == 8 and begun.num_buckets == 4
    small = run(begun)
    found = documents(tmp_path / "large", corpus)
    assert list(documents(tmp_path / "small", corpus).items()) == list(found.items())
    texts = [text for (split, _), text in found.items()]
    assert split == "tail" or len(set(texts)) == len(texts)
    for name, manifest in large.manifests.items():
        assert small[name]["skipped"] == manifest["skipped"]
        assert len(manifest["shards"]) == 1 and len(small[name]["shards"]) > 2
    sizes = [s["fields"]["text"]["num_tokens"] for s in small["train"]["shards"]]
    assert max(sizes) < 2 * min(sizes)


def test_tasks_in_any_order_and_again_give_the_same_bytes(data, tmp_path, tiny):
    corpus, hashes = Corpus([str(data)], validation_fraction=0.2), []
    for number, shuffle in enumerate((list, reversed, lambda x: random.Random(1).choices(x, k=8))):
        options = {"out": tmp_path / str(number), "packings": [Packing(("text",), (32,))]}
        begun = prepare.begin(corpus, tokenizer="bytes", **options)
        *first, write, complete = stages.stages(begun)
        for stage in (*first, write):
            for i in shuffle(stage.missing()):
                stage.run(i)
            for i in stage.missing():  # those that `choices` left out, after some ran twice
                stage.run(i)
        assert write.run(write.num_tasks() + 5) == 0
        for i in shuffle(complete.missing()):
            complete.run(i)
        [complete.run(i) for i in complete.missing()]
        assert [stage.run(0) for stage in first] == [0] * 4  # a late repetition does nothing
        manifests = prepare.finish(begun)
        assert all("best_fit-text-32-v2" in s["plans"] for s in manifests["train"]["shards"])
        hashes.append([manifest["content_hash"] for manifest in manifests.values()])
        assert sorted(p.name for p in (tmp_path / str(number)).iterdir()) == [
            "plan.json",
            "train",
            "validation",
        ]
    assert hashes[0] == hashes[1] == hashes[2]


def test_filters_and_keys_of_near_duplicates_drop_documents(data, tmp_path, tiny, monkeypatch):
    def no_sevens(document):
        number = document.fields["text"].split()[1]
        if "7" in number:
            return Skipped(document.id, "sevens/7")
        return document._replace(fields={"text": f"record {number}"})

    def keys(document):  # of the first three digits and of the last three: two bands
        number = document.fields["text"].split()[1].zfill(4)
        hashes = [key_hash(f"{i} {number[i : i + 3]}") for i in (0, 1)]
        return np.array(hashes, np.uint64)

    monkeypatch.setattr(Corpus, "load_filters", lambda self: [no_sevens])
    monkeypatch.setattr(job.Job, "near_keys", lambda self: keys)
    corpus = Corpus([str(data)], validation_fraction=0, max_loss=1)
    manifests = run(prepare.begin(corpus, tokenizer="bytes", out=tmp_path))
    found = [text.split()[1] for text in documents(tmp_path, corpus).values()]
    expected, seen, all_numbers, counts = [], set(), set(), {"duplicate": 0, "near_duplicate": 0}
    for file in sorted(data.iterdir()):
        for line in file.read_text().splitlines():
            number = json.loads(line)["text"].split()[1]
            if "7" in number:
                continue
            bands = {(i, number.zfill(4)[i : i + 3]) for i in (0, 1)}
            if number in all_numbers:
                counts["duplicate"] += 1
            elif bands & seen:
                counts["near_duplicate"] += 1
            else:
                expected.append(number)
            all_numbers.add(number)
            seen |= bands
    assert found == expected and len(found) > 50
    skipped = manifests["train"]["skipped"]
    assert {reason: skipped[reason] for reason in counts} == counts
    assert skipped["sevens/7"] > 100
