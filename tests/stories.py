"""The published weights of stories260K as a run."""

import json
import shutil
from pathlib import Path

from lm.config import conversion
from lm.hf.importing import import_folder

FOLDER = Path(__file__).parents[1] / "../shared/data/weights/stories260K"


def import_stories(home, devices):
    """The folder of the import, in `home`, with the SentencePiece model that its published pieces
    make: byte pieces, and merges in the order of their ids.
    """
    from sentencepiece import sentencepiece_model_pb2 as schema

    expected = json.loads((FOLDER / "expected.json").read_text())
    shutil.copytree(FOLDER, home / "source")
    model = schema.ModelProto()  # pyright: ignore
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = 512
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    for i, text in enumerate(expected["pieces"]):
        kind = 2 if i == 0 else 3 if i < 3 else 6 if i < 259 else 1
        piece = {1: "<s>", 2: "</s>"}.get(i, text.replace(" ", "\u2581"))
        score = min(0.0, 259.0 - i)
        if i > 464 and not text.isascii():  # published byte by byte
            piece = piece.encode("latin-1").decode()
        model.pieces.add(piece=piece, score=score, type=kind)
    (home / "source/tokenizer.model").write_bytes(model.SerializeToString())
    config = conversion.default()
    changes = {"data.length": 64, "data.batch_size": 8, "train.num_steps": 4}
    changes |= {"optimizer.learning_rate": 3e-4, "log.trackers": ("jsonl",)}
    changes |= {"loader.kind": "thread", "guard.self_check": False}
    config.update_from_flattened_dict(changes)
    options = {"say": lambda line: None}
    import_folder(str(home / "source"), str(home / "run"), config, devices[:1], **options)
    return str(home / "run")
