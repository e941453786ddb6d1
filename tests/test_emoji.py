"""The table of a package of emoji: files and captions, and one split for variants of skin."""

import json

import numpy as np
import pictures
import pytest

from lm.data.tokens import TokenStore
from lm.preparation.corpus import Corpus
from lm.preparation.prepare import prepare
from lm.tokenizers.tokenizer import ByteTokenizer
from scripts import emoji_table

NUM_NAMES = 40
TONES = ("1F3FB", "1F3FF", "1F3FB-1F3FF")


def package(folder, vendor, shift):
    """A made-up package: every third emoji has skin tones, and one has no drawing of its own."""
    (folder / "img" / vendor / "64").mkdir(parents=True)
    table = []
    for i in range(NUM_NAMES):
        tones = ["", *TONES] if i % 3 == 0 else [""]
        variants = {}
        for j, tone in enumerate(tones):
            file = f"{i}-{j}.png"
            drawing = pictures.encoded(pictures.gradient(10 + i, 20 + j + shift))
            (folder / "img" / vendor / "64" / file).write_bytes(drawing)
            variants[tone] = {"image": file, f"has_img_{vendor}": i != 5}
        base = {"name": f"NAME {i}", "short_name": f"s_{i}", "short_names": [f"s_{i}", f"name-{i}"]}
        row = base | {"category": "Signs", **variants.pop("")}
        table.append(row | ({"skin_variations": variants} if variants else {}))
    (folder / "emoji.json").write_text(json.dumps(table))
    return folder


def run(monkeypatch, data, out):
    monkeypatch.setattr("sys.argv", ["emoji_table.py", f"--data={data}", f"--out={out}"])
    emoji_table.main()
    return [json.loads(line) for line in out.read_text().splitlines()]


def names_by_split(table, out):
    """{split: {caption}} of a table's stores, and their drawings."""
    corpus = Corpus(
        [str(table)],
        {"text": "captions"},
        image="file",
        image_size=pictures.SIZE,
        split_by="name",
        validation_fraction=0.3,
    )
    prepare(corpus, tokenizer="bytes", out=out, num_workers=1)
    stores = {split: TokenStore.open(out / split) for split in ("train", "validation")}
    captions = {
        split: {ByteTokenizer().decode(store.document(i)) for i in range(store.num_documents)}
        for split, store in stores.items()
    }
    return captions, {split: s.images(np.arange(s.num_documents)) for split, s in stores.items()}


def test_two_vendors_hold_out_the_same_names_with_all_their_skin_tones(
    tmp_path, monkeypatch, capsys
):
    captions, images = {}, {}
    for shift, vendor in enumerate(("green", "blue")):
        folder = package(tmp_path / vendor / "package", vendor, shift)
        table = tmp_path / f"{vendor}.jsonl"
        rows = run(monkeypatch, folder, table)
        assert len(rows) == NUM_NAMES - 1 + 3 * 14 and {row["vendor"] for row in rows} == {vendor}
        assert "81 pictures, 162 captions, 39 names" in capsys.readouterr().out
        expected = {"file": f"{vendor}/package/img/{vendor}/64/0-3.png", "name": "name 0"}
        both = ", light and dark skin tones"
        assert rows[3].items() >= {**expected, "captions": [f"name 0{both}", f"s 0{both}"]}.items()
        assert rows[1]["captions"][0] == "name 0, light skin tone"
        captions[vendor], images[vendor] = names_by_split(table, tmp_path / f"{vendor}-stores")
    assert captions["green"] == captions["blue"]
    held = captions["green"]["validation"]
    numbers = {
        split: {c.split(",")[0].split()[-1] for c in captions["green"][split]}
        for split in captions["green"]
    }
    assert not numbers["train"] & numbers["validation"] and len(numbers["validation"]) > 4
    assert sum(", dark skin tone" in caption for caption in held) > 1
    assert not np.array_equal(images["green"]["validation"], images["blue"]["validation"])


def test_a_folder_that_is_no_package_and_a_wrong_name_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(
        SystemExit, match=r"^emoji_table: .*: no package of emoji-datasource-VENDOR"
    ):
        run(monkeypatch, tmp_path, tmp_path / "a.jsonl")
    with pytest.raises(SystemExit, match=r"--out=.*a.csv: name a file that ends with .jsonl"):
        run(monkeypatch, tmp_path, tmp_path / "a.csv")
