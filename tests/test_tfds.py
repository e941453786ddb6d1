import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import object_stores
import pictures
import pytest

from lm.data.tokens import TokenStore
from lm.preparation.corpus import Corpus
from lm.preparation.pictures import PictureFormat
from lm.preparation.prepare import prepare
from lm.sources import IMAGE, Document, Picture, Skipped, tfds
from lm.sources.tfds import TfdsSource
from lm.storage import files as storage
from lm.tokenizers.tokenizer import ByteTokenizer

BUILDER = """
import numpy as np
import tensorflow_datasets as tfds


class Poems(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=name, version="1.0.0")
        for name in ("short", "large", "shards", "pictures")
    ]

    def _info(self):
        features = {"poem": tfds.features.Text(), "title": tfds.features.Text(), "year": np.int64}
        features["by"] = {"name": tfds.features.Text(), "age": np.int64}
        features["lines"] = tfds.features.Sequence(tfds.features.Text())
        if self.builder_config.name == "pictures":
            features["picture"] = tfds.features.Image()
            features["by"]["mask"] = tfds.features.Image()
        features["mood"] = tfds.features.ClassLabel(names=["sad", "glad"])
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(40), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            large = 4000 if self.builder_config.name == "large" else 1
            poem = b"\\xff" if i == 7 else large * f"poem {i} \\u00e4\\n".encode() * 20
            mood = -1 if i == 3 else i % 2
            more = {"by": {"name": f"poet {i}", "age": i}, "lines": ["first", f"second {i}"]}
            if self.builder_config.name == "pictures":
                more["picture"] = more["by"]["mask"] = f"{i % 3}.png"  # in this folder
            yield i, {"poem": poem, "title": f"title {i}", "year": i, "mood": mood, **more}
"""
RUN = """
import sys
import tensorflow_datasets as tfds
from poems import Poems
one_shard = tfds.download.DownloadConfig(num_shards=1)
shards = tfds.download.DownloadConfig(num_shards=3)
Poems(data_dir=sys.argv[1], config="short").download_and_prepare()
Poems(data_dir=sys.argv[1], config="large").download_and_prepare(download_config=one_shard)
Poems(data_dir=sys.argv[1], config="pictures").download_and_prepare()
Poems(data_dir=sys.argv[1], config="shards").download_and_prepare(download_config=shards)
Poems(
    data_dir=sys.argv[1] + "/array", config="short", file_format="array_record"
).download_and_prepare()
"""
PICTURES = (
    pictures.encoded(pictures.gradient(40, 30)),
    pictures.png_header(20_000, 20_000),
    pictures.encoded(pictures.gradient(), "JPEG"),
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A data set that TFDS itself has built: its class must live in a package folder."""
    root = tmp_path_factory.mktemp("tfds")
    (root / "code" / "poems").mkdir(parents=True)
    (root / "code" / "poems" / "__init__.py").write_text("from poems.poems import Poems\n")
    (root / "code" / "poems" / "poems.py").write_text(BUILDER)
    for i, content in enumerate(PICTURES):
        (root / "code" / f"{i}.png").write_bytes(content)
    subprocess.run(
        [sys.executable, "-c", RUN, str(root / "data")],
        cwd=root / "code",
        check=True,
        capture_output=True,
    )
    return root / "data"


def _read(source):
    return [item for unit in source.units() for item in source.read(unit)]


def _poems(items):
    return [item.fields["text"] if isinstance(item, Document) else item.reason for item in items]


def test_classes_have_the_names_of_the_data_set(data_dir):
    columns = {"source": "title", "target": "{mood} poem"}
    items = _read(TfdsSource("poems/short", columns, data_dir=str(data_dir)))
    found = {i.fields["source"]: i.fields["target"] for i in items if isinstance(i, Document)}
    assert [i.reason for i in items if isinstance(i, Skipped)] == ["no_label"]
    assert found == {
        f"title {i}": ("glad poem" if i % 2 else "sad poem") for i in range(40) if i != 3
    }


def test_prepared_data_set_gives_its_records(data_dir):
    items = _read(TfdsSource("poems/short", {"text": "poem"}, data_dir=str(data_dir)))
    expected = {f"poem {i} ä\n" * 20 for i in range(40) if i != 7} | {"invalid_utf8"}
    assert len(items) == 40
    assert set(_poems(items)) == expected
    assert items[0].id == "poems/short/1.0.0/train@0"


def test_units_are_whole_shards_and_the_same_by_the_name_of_the_folder(data_dir):
    whole = _read(TfdsSource("poems/short", {"text": "poem"}, data_dir=str(data_dir)))
    source = TfdsSource(str(data_dir / "poems/short/1.0.0"), {"text": "poem"})
    assert _read(source) == whole
    folder = data_dir / "poems/shards/1.0.0"
    units = TfdsSource(str(folder), {"text": "poem"}).units()
    assert len(units) == len(list(folder.glob("*train*"))) == 3
    assert sum(unit.stop - unit.start for unit in units) == 40


@pytest.mark.parametrize("folder", ["poems/shards", "array/poems/short"])
def test_a_data_set_in_a_bucket_gives_what_it_gives_on_disk(data_dir, monkeypatch, folder):
    columns = {"text": "{mood}: {poem}"}
    local = TfdsSource(str(data_dir / folder / "1.0.0"), columns)
    with object_stores.in_this_process():
        there = f"gs://{object_stores.BUCKET}/{folder}"
        for file in (data_dir / folder / "1.0.0").iterdir():
            storage.write_atomically(f"{there}/{file.name}", file.read_bytes())
        source = TfdsSource(there, columns)
        assert _read(source) == _read(local)
        copied = os.listdir(tfds._description_on_disk(there).name)
        assert "dataset_info.json" in copied and not [n for n in copied if "-of-" in n]


def test_a_feature_is_named_by_its_path(data_dir):
    columns = {"text": "{by.name}, {lines.1}"}
    items = _read(TfdsSource("poems/short", columns, "test", str(data_dir)))
    assert sorted(_poems(items)) == [f"poet {i}, second {i}" for i in range(3)]


def test_pictures_stay_files_that_the_preparation_decodes_within_bounds(data_dir, tmp_path):
    columns = {"text": "lines", IMAGE: "picture"}
    items = _read(TfdsSource("poems/pictures", columns, "train", str(data_dir)))
    assert len(items) == 40 and {item.picture.content for item in items} == {*PICTURES}
    assert items[0].picture.captions[0].startswith("second")
    corpus = Corpus(
        ["tfds:poems/pictures"],
        {"text": "title"},
        tfds_data_dir=str(data_dir),
        image="picture",
        image_size=pictures.SIZE,
        validation_fraction=0,
        max_loss=0.5,
    )
    prepared = prepare(corpus, tokenizer="bytes", out=tmp_path / "out", num_workers=1)
    assert prepared.manifests["train"]["skipped"] == {"picture_too_large": 13}
    store = TokenStore.open(tmp_path / "out" / "train")
    first = PictureFormat(pictures.SIZE).convert(Picture(PICTURES[0])).content
    found = {
        ByteTokenizer().decode(store.document(i)): store.images(np.array([i]))[0]
        for i in range(store.num_documents)
    }
    assert len(found) == 27 and all((found[f"title {i}"] == first).all() for i in range(0, 40, 3))


def test_array_records_are_read_as_well(data_dir, monkeypatch):
    def poems(folder):
        return _poems(_read(TfdsSource("poems/short", {"text": "poem"}, data_dir=str(folder))))

    whole = poems(data_dir / "array")
    assert sorted(whole) == sorted(poems(data_dir)) and len(whole) == 40
    monkeypatch.setattr("lm.sources.tfds._ARRAY_RECORD_UNIT_BYTES", 1500)
    assert poems(data_dir / "array") == whole


def test_a_shard_is_read_once(data_dir):
    def bytes_read():
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(lines[0].removeprefix("rchar: "))

    [file] = (data_dir / "poems/large/1.0.0").glob("*train*")
    source = TfdsSource("poems/large", {"text": "poem"}, data_dir=str(data_dir))
    units = source.units()
    _read(TfdsSource("poems/short", {"text": "poem"}, "test", str(data_dir)))  # imports are done
    before = bytes_read()
    assert sum(1 for unit in units for _ in source.read(unit)) == 40
    assert bytes_read() - before < 1.3 * file.stat().st_size


@pytest.mark.parametrize(
    ("folder", "kind", "kept"),
    [("poems", "tfrecord", 15), ("array/poems", "array_record", 0)],
)
def test_damaged_records_are_counted(data_dir, tmp_path, folder, kind, kept):
    file = f"poems-train.{kind}-00000-of-00001"
    shutil.copytree(data_dir / folder / "short/1.0.0", tmp_path / "copy")
    content = bytearray((tmp_path / "copy" / file).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "copy" / file).write_bytes(content)
    items = _read(TfdsSource(str(tmp_path / "copy"), {"text": "poem"}))
    assert len(items) == 40
    damaged = [item for item in items if getattr(item, "reason", "") == "damaged_file"]
    assert damaged and damaged[0].detail
    assert len(items) - len(damaged) >= kept


def test_splits_and_fields_are_chosen_by_name(data_dir):
    columns = {"inputs": "title", "targets": "poem"}
    source = TfdsSource("poems/short", columns, split="test+train", data_dir=str(data_dir))
    items = _read(source)
    assert len(items) == 43
    titles = {item.fields["inputs"] for item in items[:3]}
    assert titles == {"title 0", "title 1", "title 2"}
    years = _read(TfdsSource("poems/short", {"text": "year"}, "test", str(data_dir)))
    assert {item.reason for item in years if isinstance(item, Skipped)} == {"field_is_not_text"}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("poems/short", {"columns": {"text": "text"}}, "no feature 'text'; it has .*poem"),
        ("poems/short", {"split": "dev"}, "no split 'dev'; it has .*train"),
        ("poems/short", {"split": "train[:5]"}, "no split"),
        ("poems/long", {}, "poems/long is not prepared in .*--tfds-download"),
        ("imdb_reviews/plain_text", {}, "is not prepared in"),
        ("imdb_reviews", {}, "is not prepared in"),
        ("no_such_data_set", {}, "is not prepared in"),
        ("no_such_data_set", {"download": True}, "could not be downloaded and prepared"),
        (".", {}, "a folder, but no data set"),
        ("/no/such/folder", {}, "tfds:/no/such/folder: no such folder; name the folder of a"),
        ("~/no/such", {}, "tfds:~/no/such: no such folder"),
        ("", {}, "'' is no path"),
        ("a b?", {}, "tfds:a b. is not prepared in"),
    ],
)
def test_data_set_that_is_not_there_is_one_quick_error(data_dir, name, changes, message):
    source = TfdsSource(
        **{"name": name, "columns": {"text": "poem"}, "data_dir": str(data_dir), **changes}
    )
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        source.units()
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 20


def test_tensorflow_is_imported_only_to_read_a_data_set():
    code = "import sys, lm.preparation.prepare; print({'tensorflow', 'jax'} & set(sys.modules))"
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.stdout == "set()\n"
