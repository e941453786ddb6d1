"""Pictures with captions: decoded within bounds, prepared once, and read as rows of training."""

import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pictures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile

from lm.config.schema import DataConfig
from lm.data import shapes
from lm.data.pipeline import make_source
from lm.data.rows import RowLayout
from lm.data.tokens import TokenStore
from lm.preparation import parts as parts_module
from lm.preparation import picture_parts, sharding, stages
from lm.preparation.corpus import Corpus
from lm.preparation.pictures import PictureFormat, Unreadable
from lm.preparation.prepare import begin, finish, prepare, summary
from lm.preparation.token_writer import write_store
from lm.sources import Document, Picture
from lm.storage import files as storage
from lm.tokenizers.tokenizer import ByteTokenizer

ROOT = Path(__file__).resolve().parent.parent
SIZE = pictures.SIZE


def convert(content, **options):
    wanted = PictureFormat(**{"size": SIZE, **options})
    return np.asarray(wanted.convert(Picture(content)).content)


@pytest.mark.parametrize("name", pictures.DECODED)
def test_pictures_of_every_kind_have_defined_pixels(name):
    found = convert(pictures.DECODED[name])
    plain = np.asarray(pictures.gradient())
    red = np.zeros_like(plain)
    red[:, : SIZE // 2], red[:, SIZE // 2 :] = (255, 0, 0), 255
    grey = np.repeat(pictures.grey16()[..., None], 3, -1)
    expected, tolerance = {
        "photo.jpg": (plain, 3),
        "progressive.jpg": (plain, 3),
        "stereo.jpg": (plain, 3),
        "cmyk.jpg": (plain, 3),
        "palette.png": (plain, 12),
        "still.gif": (plain, 12),
        "deep.png": (grey, 0),
        "deep_grey.png": (grey, 0),
        "transparent.png": (red, 0),
        "rotated.png": (np.rot90(plain, -1), 0),
        "wide.png": (np.asarray(pictures.gradient(3 * SIZE, SIZE))[:, SIZE : 2 * SIZE], 0),
        "dot.png": (np.zeros_like(plain), 0),
        "bits.png": (np.asarray(pictures.gradient().convert("1").convert("RGB")), 0),
    }.get(name, (plain, 0))
    assert found.shape == (SIZE, SIZE, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).mean() <= tolerance


@pytest.mark.parametrize("name", pictures.SKIPPED)
def test_hostile_pictures_are_refused_with_a_reason(name, monkeypatch):
    content, reason = pictures.SKIPPED[name]
    if reason != "damaged_picture":  # known from the header: no pixel is decoded

        def decoded(image):
            raise AssertionError(f"{name} was decoded")

        monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    with pytest.raises(Unreadable) as error:
        convert(content)
    assert error.value.reason == reason


@pytest.mark.parametrize("name", pictures.MANY_PARTS)
def test_as_many_parts_as_are_allowed_are_read(name):
    found, plain = convert(pictures.MANY_PARTS[name]).astype(int), pictures.gradient()
    assert np.abs(found - np.asarray(plain)).mean() < 12
    with pytest.raises(Unreadable, match=r"too_many_parts: more than [\d,]+ \w+"):
        convert(pictures.SKIPPED[name][0])


def test_parts_of_a_picture_with_a_preview_and_of_a_file_behind_it_are_not_counted():
    preview = pictures.encoded(pictures.gradient(), "JPEG", progressive=True)
    behind = preview * 200
    exif = Image.Exif()
    exif[0x927C] = behind[:60_000]  # of the camera's own
    content = pictures.encoded(pictures.gradient(), "JPEG", exif=exif) + behind
    assert content.count(b"\xff\xda") > 1000 and picture_parts.excess(content) is None
    assert convert(content).shape == (SIZE, SIZE, 3)


def test_the_limit_of_pixels_is_of_width_times_height():
    assert convert(pictures.encoded(pictures.gradient(40, 30)), max_pixels=1200).shape[0] == SIZE
    with pytest.raises(Unreadable, match="40 x 30 pixels"):
        convert(pictures.encoded(pictures.gradient(40, 30)), max_pixels=1199)


def test_every_cut_and_every_flipped_byte_ends_in_pixels_or_a_reason():
    rng, reasons = np.random.default_rng(0), set()
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        whole = pictures.encoded(pictures.gradient(), form)
        for trial in range(60):
            content = bytearray(whole)
            content[int(rng.integers(len(whole)))] = int(rng.integers(256))
            cut = int(rng.integers(len(whole))) if trial % 2 else len(whole)
            try:
                assert convert(bytes(content[:cut])).shape == (SIZE, SIZE, 3)
            except Unreadable as error:
                reasons.add(error.reason)
    assert reasons >= {"damaged_picture", "no_known_picture"}


def test_fits_keep_the_middle_or_all_of_a_picture():
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (10, 0, 30, 20))
    content = pictures.encoded(image)
    assert (convert(content, size=20) == (0, 0, 255)).all()
    padded = convert(content, size=40, fit="pad", background="#00ff00")
    assert (padded[:10] == (0, 255, 0)).all() and (padded[30:] == (0, 255, 0)).all()
    assert (padded[10:30] == np.asarray(image)).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 0}, "--image-size=0: give a number from 1 to 4096"),
        ({"image_background": "mauvish"}, "--image-background=mauvish is no colour"),
        ({"image_max_pixels": 0}, "--image-max-pixels=0"),
        ({"image_fit": "stretch"}, "--image-fit"),
        ({"split": "tail"}, "give --image without --split=tail"),
        ({"near_duplicates": ""}, "give --image without .* --near-duplicates"),
        ({"columns": {"a": "a", "b": "b"}}, "give --image without .* a second --field"),
        ({"image": None, "image_fit": "pad"}, "--image-fit is of pictures: it needs --image"),
        ({"image": None, "split_by": "x", "split": "tail"}, "--split-by is of whole documents"),
    ],
)
def test_wrong_flags_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Corpus(**{"data": ["x"], "image": "file", **options})


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """300 drawings with captions, repetitions, and every kind of odd and hostile picture."""
    root = tmp_path_factory.mktemp("table")
    (root / "pictures").mkdir()
    images, texts = (
        shapes.draw(np.arange(300), size=32, seed=0),
        shapes.captions(np.arange(300), seed=0),
    )
    lines = []
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        Image.fromarray(image).save(root / "pictures" / f"{i}.png")
        lines.append({"file": f"pictures/{i}.png", "text": text, "group": f"group {i // 3}"})
    others = {name: content for name, (content, _) in pictures.SKIPPED.items()} | pictures.DECODED
    for name, content in others.items():
        (root / "pictures" / name).write_bytes(content)
        lines.append({"file": f"pictures/{name}", "text": name, "group": name})
    lines += [
        lines[5],  # a duplicate
        {**lines[5], "text": "another text", "group": "new"},
        {**lines[7], "text": ["one", "two", " ", "three"]},
        {"file": "pictures/none.png", "text": "missing", "group": "x"},
        {"file": "pictures", "text": "a folder", "group": "x"},
        {"file": "/dev/zero", "text": "endless", "group": "x"},
        {"file": "https://example.com/a.png", "text": "remote", "group": "x"},
        {"file": None, "text": "null", "group": "x"},
        {"file": 3, "text": "a number", "group": "x"},
        {"text": "no column", "group": "x"},
        {**lines[8], "text": []},
    ]
    (root / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def corpus_of(table, name="table.jsonl", **options):
    given = {"image": "file", "image_size": SIZE, "validation_fraction": 0.2, "max_loss": 0.3}
    return Corpus([f"{table}/{name}"], split_by="group", **{**given, **options})


@pytest.fixture
def tiny(monkeypatch):
    """Parts, blocks and shards of a few pictures."""
    monkeypatch.setattr(parts_module, "_MIN_PICTURE_PART", 2000)
    monkeypatch.setattr("lm.sources.file_source._PICTURE_UNIT_BYTES", 2000)
    monkeypatch.setattr(stages, "_BLOCK_CHARACTERS", 10 * 3 * SIZE**2)
    monkeypatch.setattr(sharding, "SHARD_BYTES", 50 * 3 * SIZE**2)


@pytest.fixture(scope="module")
def prepared(table):
    out = table.parent / "prepared_pictures"
    return out, prepare(corpus_of(table), tokenizer="bytes", out=out, num_workers=1)


def content(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def read(store):
    """{caption: picture} of a store."""
    found = {}
    for i in range(store.num_documents):
        text = ByteTokenizer().decode(store.document(i))
        [found[text]] = store.images(np.array([i]))
    return found


def test_every_row_is_a_picture_of_the_store_or_a_counted_skip(table, prepared):
    out, result = prepared
    found = {}
    for split in ("train", "validation"):
        store = TokenStore.open(out / split)
        store.verify()
        found |= read(store)
    images = shapes.draw(np.arange(300), size=32, seed=0)
    for text, image in zip(shapes.captions(np.arange(300), seed=0), images, strict=True):
        assert (found[text] == convert(pictures.encoded(Image.fromarray(image)))).all()
    seventh = convert((table / "pictures" / "7.png").read_bytes())
    assert all((found[text] == seventh).all() for text in ("one", "two", "three"))
    # files of the same pixels and other captions are documents of their own
    assert found.keys() >= {*pictures.DECODED, "another text"}
    assert len(found) == 300 + len(pictures.DECODED) + 4
    skipped = {}
    for manifest in result.manifests.values():
        for reason, count in manifest["skipped"].items():
            skipped[reason] = skipped.get(reason, 0) + count
    expected = {"duplicate": 1, "empty": 1, "missing_field": 1, "remote_picture": 1}
    expected["no_picture"] = 5
    for _, reason in pictures.SKIPPED.values():
        expected[reason] = expected.get(reason, 0) + 1
    assert skipped == expected
    assert "pictures of 24 x 24" in summary(result.manifests)
    examples = result.manifests["train"]["skipped_examples"]["picture_too_large"]
    assert any(re.search(r"\.\w+: 10000 x 4000 pixels", example) for example in examples)


def test_one_picture_of_several_captions_is_stored_once_in_one_split(prepared):
    out, result = prepared
    for split, manifest in result.manifests.items():
        store = TokenStore.open(out / split)
        ids = [store.document_ids(i) for i in range(store.num_documents)]
        several = [i for i, name in enumerate(ids) if name.partition("#")[0] + "#1" in ids]
        assert manifest["images"]["num_images"] <= manifest["num_documents"] - (
            len(several) - bool(several)
        )
        assert len(several) in (0, 3)
        shard = manifest["shards"][0]
        num_images = manifest["images"]["num_images"]
        assert shard["files"]["images.bin"]["size"] == num_images * SIZE * SIZE * 3


def test_documents_of_one_key_are_in_one_split(table, prepared):
    out, _ = prepared
    splits = {}
    for line in (table / "table.jsonl").read_text().splitlines()[:300]:
        row = json.loads(line)
        splits.setdefault(row["group"], set()).add(row["text"])
    train, validation = (read(TokenStore.open(out / s)).keys() for s in ("train", "validation"))
    sides = [(bool(texts & train), bool(texts & validation)) for texts in splits.values()]
    assert {(True, False), (False, True)} == set(sides)
    assert 5 < sum(held for _, held in sides) < 40


def test_small_parts_blocks_and_shards_hold_the_same_pictures(table, prepared, tmp_path, tiny):
    out, result = prepared
    again = prepare(corpus_of(table), tokenizer="bytes", out=tmp_path / "out", num_workers=1)
    assert len(again.manifests["train"]["shards"]) > 3
    for split in ("train", "validation"):
        store, other = TokenStore.open(out / split), TokenStore.open(tmp_path / "out" / split)
        assert again.manifests[split]["skipped"] == result.manifests[split]["skipped"]
        every = np.arange(store.num_documents)
        assert (store.images(every) == other.images(every)).all()
        backwards = every[::-3]
        assert (other.images(backwards) == store.images(every)[backwards]).all()
        assert all(store.document_ids(i) == other.document_ids(i) for i in every)


def test_tasks_in_any_order_and_again_give_the_same_bytes(table, tmp_path, tiny):
    for out, order in ((tmp_path / "a", list), (tmp_path / "b", lambda tasks: tasks[::-1])):
        job = begin(corpus_of(table), tokenizer="bytes", out=out)
        assert job.num_parts > 10
        for stage in stages.stages(job):
            for i in order(stage.missing()) * 2:
                stage.run(i)
        finish(job)
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.slow
def test_killed_preparations_and_two_workers_give_the_same_bytes(table, tmp_path):
    """4,000 rows, in 6 parts; killed while they are read, and when all are."""
    rows = [{"file": f"{table}/pictures/{i % 300}.png", "text": f"text {i}"} for i in range(4000)]
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = Corpus([str(data)], image="file", image_size=SIZE)
    prepare(corpus, tokenizer="bytes", out=tmp_path / "alone", num_workers=1)
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--workers=2"]
    command += [f"--data={data}", "--tokenizer=bytes", f"--out={out}"]
    command += ["--image=file", f"--image-size={SIZE}"]
    for seen in ("part-000000.json", "part-000003.json", "bucket-0000.bin", ""):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while seen and not list(out.glob(f"parts-*/{seen}")):
            assert process.poll() is None, f"ended before {seen}"
            time.sleep(0.01)
        if seen:
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert content(out) == content(tmp_path / "alone")


def test_another_size_is_another_preparation(table, prepared):
    with pytest.raises(ValueError, match=r"other inputs: .*images .*'size': 24.*'size': 32"):
        prepare(corpus_of(table, image_size=32), tokenizer="bytes", out=prepared[0])


def test_verify_finds_a_flipped_byte_of_a_picture(prepared, tmp_path):
    shutil.copytree(prepared[0] / "train", tmp_path / "store")
    file = tmp_path / "store" / "shard-00000" / "images.bin"
    pixels = bytearray(file.read_bytes())
    pixels[len(pixels) // 2] ^= 1
    file.write_bytes(pixels)
    with pytest.raises(ValueError, match=r"images\.bin: content hash"):
        TokenStore.open(tmp_path / "store").verify()
    file.write_bytes(pixels[:-1])
    with pytest.raises(ValueError, match=r"images\.bin"):
        TokenStore.open(tmp_path / "store").images(np.arange(1))


def rows_of(path, *, length=64, size=SIZE, too_long="error"):
    layout = RowLayout((length,), image_size=size)
    return make_source(str(path), DataConfig(too_long=too_long), layout, ByteTokenizer())


def check_rows(path, store):
    source = rows_of(path)
    assert len(source) == store.num_documents and not source.truncation_summary
    some = np.array([5, 0, len(source) - 1, 5])
    rows = source.read(some)
    assert (rows.images == store.images(some)).all() and rows.previous.max() == -1
    for i, ids, segments, positions in zip(
        some.tolist(), rows.ids, rows.segments, rows.positions, strict=True
    ):
        tokens = store.document(i)
        assert (ids[: len(tokens)] == tokens).all() and not ids[len(tokens) :].any()
        assert (segments == (np.arange(64) < len(tokens))).all()
        assert (positions == np.arange(64) * segments).all()
    spans = [span for [span] in source.documents(some)]
    assert [span.id for span in spans] == [store.document_ids(i) for i in some.tolist()]
    with pytest.raises(IndexError):
        source.read(np.array([len(source)]))


def test_rows_are_a_caption_and_its_picture(prepared):
    path = prepared[0] / "train"
    check_rows(path, TokenStore.open(path))
    assert rows_of(path).bytes_per_token == pytest.approx(
        TokenStore.open(path).num_bytes / TokenStore.open(path).num_tokens
    )


def test_a_store_of_pictures_is_prepared_and_read_in_a_bucket(table, folder):
    if "://" in folder:
        for file in [table / "table.jsonl", *(table / "pictures").iterdir()][:60]:
            name = file.relative_to(table).as_posix()
            storage.write_atomically(f"{folder}/data/{name}", file.read_bytes())
    data = f"{folder}/data" if "://" in folder else table
    corpus = corpus_of(data, max_loss=1.0)
    prepare(corpus, tokenizer="bytes", out=f"{folder}/out", num_workers=1)
    store = TokenStore.open(f"{folder}/out/train")
    store.verify()
    assert store.num_documents > 20
    check_rows(f"{folder}/out/train", store)


@pytest.fixture
def captioned(tmp_path):
    """A store of three shards, whose captions have 1 to 9 letters."""
    images = shapes.draw(np.arange(30), size=16, seed=0)
    documents = [
        Document(f"d{i}", {"text": "x" * (i % 9 + 1)}, picture=Picture(image))
        for i, image in enumerate(images)
    ]
    options = {"shard_documents": 12, "image_size": 16}
    write_store(tmp_path / "store", documents, ByteTokenizer(), **options)
    return tmp_path / "store", images


def test_long_captions_are_an_error_cut_or_dropped(captioned):
    path, images = captioned
    with pytest.raises(ValueError, match=r"9 of 30 captions are longer than data.length \(7\)"):
        rows_of(path, length=7, size=16)
    cut = rows_of(path, length=7, size=16, too_long="cut")
    rows = cut.read(np.arange(30))
    assert len(cut) == 30 and (rows.images == images).all() and cut.bytes_per_token is None
    lengths = np.minimum(np.arange(30) % 9 + 2, 7)
    assert (rows.segments.sum(1) == lengths).all()
    assert (rows.ids[np.arange(30), lengths - 1] == ByteTokenizer.eos_id).all()
    assert "9 were cut" in cut.truncation_summary
    dropped = rows_of(path, length=7, size=16, too_long="drop")
    kept = np.flatnonzero(np.arange(30) % 9 + 2 <= 7)
    rows = dropped.read(np.arange(21))
    assert len(dropped) == 21 and (rows.images == images[kept]).all()
    assert [span.document for [span] in dropped.documents(np.arange(21))] == kept.tolist()
    assert "9 were dropped" in dropped.truncation_summary
    with pytest.raises(ValueError, match="none of its 30 captions fits"):
        rows_of(path, length=1, size=16, too_long="drop")


def test_pictures_of_another_size_are_an_error(captioned, prepared):
    path, _ = captioned
    with pytest.raises(ValueError, match="16 x 16, and the objective takes 32 x 32"):
        rows_of(path, size=32)
    with pytest.raises(ValueError, match="8 x 8: prepare it with --image-size=8"):
        rows_of(path, size=8)
    text = path.parent / "text"
    write_store(text, [Document("0", {"text": "ab"})], ByteTokenizer())
    with pytest.raises(ValueError, match="a store of text without pictures"):
        rows_of(text)
    layout = RowLayout((64,))  # the captions alone
    rows = make_source(str(path), DataConfig(), layout, ByteTokenizer()).read(np.arange(1))
    assert rows.images is None


TABLES = ("csv", "tsv", "parquet", "parquet of bytes", "parquet of datasets", "tar")


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_every_kind_name_pictures(kind, tmp_path):
    files = {f"{i}.png": pictures.encoded(pictures.gradient(seed=i)) for i in range(6)}
    names, texts = [*files], [f'a "quoted", caption {i}' for i in range(6)]
    image, text, data = "file", "text", tmp_path / "table"
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    if kind == "csv":
        quoted = [t.replace('"', '""') for t in texts]
        lines = [f'{n},"{t}"' for n, t in zip(names, quoted, strict=True)]
        data = data.with_suffix(".csv")
        data.write_bytes(("\ufefffile,text\r\n" + "\r\n".join(lines)).encode())
    elif kind == "tsv":
        data = data.with_suffix(".tsv")
        data.write_text("".join(f"{n}\t{t}\n" for n, t in zip(names, texts, strict=True)))
        image, text = "1", "2"
    elif kind == "tar":
        data = data.with_suffix(".tar")
        write_tar(
            data,
            {f"s{i}.png": c for i, c in enumerate(files.values())}
            | {f"s{i}.txt": t.encode() for i, t in enumerate(texts)},
        )
        image = "png"
    else:
        column = {
            "parquet": names,
            "parquet of bytes": [*files.values()],
            "parquet of datasets": [{"bytes": c, "path": None} for c in files.values()],
        }[kind]
        data = data.with_suffix(".parquet")
        pq.write_table(pa.table({"file": column, "text": texts}), data, row_group_size=2)
    corpus = Corpus(
        [str(data)], {"text": text}, image=image, image_size=SIZE, validation_fraction=0
    )
    prepare(corpus, tokenizer="bytes", out=tmp_path / "out", num_workers=1)
    found = read(TokenStore.open(tmp_path / "out" / "train"))
    assert list(found) == texts
    assert all((image == pictures.gradient(seed=i)).all() for i, image in enumerate(found.values()))


def write_tar(path, members):
    import tarfile

    with tarfile.open(path, "w") as tar:
        for name, content in sorted(members.items()):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("image_size", [None, SIZE])
def test_stores_of_text_and_their_plans_are_as_before(tmp_path, image_size):
    """Without --image no file and no key of the manifest is new."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "hello", "file": "a.png"}))
    (tmp_path / "a.png").write_bytes(pictures.DECODED["plain.png"])
    image = "file" if image_size else None
    corpus = Corpus([f"{tmp_path}/a.jsonl"], validation_fraction=0, image=image)
    [manifest] = prepare(corpus, tokenizer="bytes", out=tmp_path / "out").manifests.values()
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    has = {"images" in manifest, "images" in plan, "images.bin" in manifest["shards"][0]["files"]}
    assert has == {image_size is not None} and "split_by" not in plan
