"""Pictures of emoji and their names, as a table for prepare_data.py: from an unpacked npm package.

    npm pack emoji-datasource-google@16.0.0  # or emoji-datasource-twitter; then unpack it
    python scripts/emoji_table.py --data=package --out=data/emoji/google.jsonl
    python scripts/prepare_data.py --data=data/emoji/google.jsonl --field=text=captions \\
        --image=file --split-by=name --validation-fraction=0.1 --tokenizer=bytes --out=data/google

A row has a picture's file, its captions, and the name of the emoji without its skin tones: with
--split-by=name the variants of one emoji are in one split, the same one for every vendor.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from lm import cli
from lm.storage import files as storage
from lm.storage.paths import expand_local_path

TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="the unpacked package: emoji.json and img/")
    add(
        "--out", required=True, metavar="FILE.jsonl", help="the table; its paths are relative to it"
    )
    flags = parser.parse_args()
    try:
        folder = Path(expand_local_path(flags.data, "--data"))
        out = Path(expand_local_path(flags.out, "--out"))
        if out.suffix != ".jsonl":
            raise ValueError(f"--out={flags.out}: name a file that ends with .jsonl")
        found = list(rows(folder, out.parent))
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
        storage.write_atomically(out, "".join(lines))
    except (ValueError, OSError) as error:
        sys.exit(f"emoji_table: {error}")
    names, captions = {row["name"] for row in found}, sum(len(row["captions"]) for row in found)
    print(f"{out}: {len(found):,} pictures, {captions:,} captions, {len(names):,} names")


def rows(folder: Path, relative_to: Path) -> Iterator[dict]:
    """Yield a row for each picture of a package. Raises ValueError where it is none."""
    vendors = sorted(path.parent.name for path in folder.glob("img/*/64"))
    if len(vendors) != 1 or not (folder / "emoji.json").is_file():
        raise ValueError(
            f"{folder}: no package of emoji-datasource-VENDOR: no emoji.json, img/*/64"
        )
    [vendor] = vendors
    for emoji in json.loads((folder / "emoji.json").read_text("utf-8")):
        name = (emoji["name"] or emoji["short_name"]).lower()
        others = [text.replace("_", " ").replace("-", " ") for text in emoji["short_names"]]
        texts = dict.fromkeys([name, *others])
        for tones, variant in [("", emoji), *emoji.get("skin_variations", {}).items()]:
            file = folder / "img" / vendor / "64" / variant["image"]
            if variant[f"has_img_{vendor}"] and file.is_file():
                yield {
                    "file": os.path.relpath(file, relative_to),
                    "captions": [text + _skin(tones) for text in texts],
                    "name": name,
                    "category": emoji["category"],
                    "vendor": vendor,
                }


def _skin(tones: str) -> str:
    """Return ", light skin tone" of the code points of tones, "" of none."""
    names = list(dict.fromkeys(TONES[tone] for tone in tones.split("-") if tone in TONES))
    plural = "s" if len(names) > 1 else ""
    return f", {' and '.join(names)} skin tone{plural}" if names else ""


if __name__ == "__main__":
    main()
