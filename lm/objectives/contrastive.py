"""Pictures and texts that belong together, told from those that don't (lm.layers.pair_loss).

A row is a picture and its caption. Evaluation ranks all of a source: `picture_to_text_recall_K` is
the share of pictures for which a right caption is among the K nearest, `text_to_picture_recall_K`
that of captions. Pictures and captions that occur several times count once; all that occur with
each other are right answers, so that a caption of several pictures finds any of them.

With `classes`, `zero_shot_accuracy` is the share of pictures whose class has the nearest text: the
mean of the embeddings of its prompts, as in CLIP. The class of a picture is that whose name or
prompt is its caption; others, `zero_shot_pictures` fewer, have none.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from lm.config.fields import field
from lm.data import images
from lm.data.rows import RowLayout, Rows
from lm.data.sampler import hash_words
from lm.objectives import ModelInterface, Objective, PairLoss, RowGenerator
from lm.telemetry import metrics
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import Batch, HostBatch, HostTokens, Tokens

RECALLS = (1, 5, 10)
_BLOCK = 2**24  # scores at a time


@dataclasses.dataclass(frozen=True)
class Config:
    loss: str = field(
        "softmax",
        "Over all texts of the batch (CLIP), or a sigmoid of every pair (SigLIP).",
        choices=("softmax", "sigmoid"),
    )
    begins_with_bos: bool = field(True, "A bos precedes captions.")
    flip: bool = field(False, "Mirror every other picture in training.")
    crop: float = field(
        1.0, "Smallest share of a picture that crops of training keep; 1: all of it.", gt=0, le=1
    )
    classes: tuple[str, ...] = field((), "Names of classes, told apart in evaluation.")
    templates: tuple[str, ...] = field(("{}",), "Prompts of a class, with {} for its name.")


def build(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> Objective:
    """Return the objective; its model is lm.models.clip."""
    if (size := interface.image_size) is None:
        raise ValueError(
            "config.objective.name=contrastive needs a model of pictures and texts: "
            "config.model.name=clip"
        )
    length, bos = interface.length, tokenizer.bos_id if config.begins_with_bos else None
    layout = RowLayout((length - (bos is not None),), image_size=size)
    class_of = _class_by_caption(config, tokenizer, layout.length)

    def pairs(rows: Rows, rng: RowGenerator) -> HostBatch:
        assert rows.images is not None, "the layout has pictures"
        captions = _hash_captions(rows.ids)
        classes = np.array([class_of.get(key, -1) for key in captions.tolist()], np.int32)
        hashes = np.stack([captions, _hash_pictures(rows.images)], 1)  # [B, 2]
        return Batch(
            inputs=_with_bos(rows.ids, rows.segments, bos),
            targets=np.concatenate([hashes.view(np.int32), classes[:, None]], 1),
            weights=(rows.segments[:, :1] != 0).astype(np.float32),
            images=rows.images,
        )

    def encode(texts: Sequence[str]) -> HostTokens:
        return _with_bos(*_encode(texts, tokenizer, layout.length), bos)

    scale = (config.crop, 1.0) if config.crop < 1 else None

    def augmented(rows: Rows, rng: RowGenerator) -> HostBatch:
        batch = pairs(rows, rng)
        assert batch.images is not None, "made of those of rows"
        pictures = images.augment(batch.images, rng, flip=config.flip, crop_scale=scale, size=size)
        return dataclasses.replace(batch, images=pictures)

    return Objective(
        augmented,
        layout,
        pairs=PairLoss(
            config.loss,
            encode,
            [t.replace("{}", name) for name in config.classes for t in config.templates],
            functools.partial(compare, num_classes=len(config.classes)),
        ),
        summarize=_means,
        make_evaluation=pairs,
    )


def _encode(
    texts: Sequence[str], tokenizer: Tokenizer, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, segments) of texts, int32 [n, length], each with its eos."""
    result = np.zeros((2, len(texts), length), np.int32)
    for ids, segments, text, encoded in zip(
        *result, texts, tokenizer.encode_batch(texts), strict=True
    ):
        if len(encoded) >= length:
            raise ValueError(
                f"the text {text!r} has {len(encoded)} tokens, and with eos no more than {length} "
                "fit into config.data.length"
            )
        ids[: len(encoded) + 1] = [*encoded, tokenizer.eos_id]
        segments[: len(encoded) + 1] = 1
    return result[0], result[1]


def _class_by_caption(config: Config, tokenizer: Tokenizer, length: int) -> dict[int, int]:
    """Return {hash of a caption: number of its class}; ValueError where two classes share one."""
    if wrong := [t for t in config.templates if "{}" not in t]:
        raise ValueError(f"config.objective.templates: {wrong[0]!r} has no {{}} for the class")
    if config.classes and not config.templates:
        raise ValueError("config.objective.templates is empty: give a prompt for the classes")
    found: dict[int, int] = {}
    for number, name in enumerate(config.classes):
        texts = [name, *(template.replace("{}", name) for template in config.templates)]
        for text, key in zip(
            texts, _hash_captions(_encode(texts, tokenizer, length)[0]).tolist(), strict=True
        ):
            if found.setdefault(key, number) != number:
                raise ValueError(
                    f"config.objective.classes: {config.classes[found[key]]!r} and {name!r} share "
                    f"the text {text!r}"
                )
    return found


def _with_bos(ids: np.ndarray, segments: np.ndarray, bos: int | None) -> HostTokens:
    """Return captions [n, T], preceded by bos if there is one; an empty row stays empty."""
    if bos is not None:
        first = segments[:, :1]
        ids, segments = (np.concatenate(x, 1) for x in ((bos * first, ids), (first, segments)))
    positions = np.arange(ids.shape[1], dtype=np.int32) * segments
    return Tokens(ids, segments, positions)


def _hash_captions(ids: np.ndarray) -> np.ndarray:
    """Return uint64 [n], hashes of captions [n, T]: their eos ends them, so that padding may be
    hashed as well.
    """
    return np.broadcast_to(hash_words(*ids.T), len(ids))


def _hash_pictures(pictures: np.ndarray) -> np.ndarray:
    """Return uint64 [n], hashes of pictures, uint8 [n, H, W, 3], before they are augmented."""
    digests = [hashlib.blake2b(x.tobytes(), digest_size=8).digest() for x in pictures]
    return np.frombuffer(b"".join(digests), np.uint64)


def _means(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return means over pictures. The loss is that within batches of evaluation."""
    values = metrics.means({name: float(value) for name, value in sums.items()})
    del values["objective"]
    return values


def compare(
    embeddings: np.ndarray, targets: np.ndarray, prompts: np.ndarray, *, num_classes: int
) -> dict[str, float]:
    """Return recalls both ways, and the accuracy by prompts, those of each class together.

    embeddings: float32 [N, 2, E]; targets: int32 [N, 5]; prompts: float32 [M, E].
    """
    words = np.ascontiguousarray(targets[:, :4]).view(np.uint64)  # [N, 2]: caption, picture
    (text_rows, text), (picture_rows, picture) = (
        np.unique(hashes, return_index=True, return_inverse=True)[1:] for hashes in words.T
    )
    pictures, texts = embeddings[picture_rows, 0], embeddings[text_rows, 1]
    result: dict[str, float] = {}
    for name, ranks in (
        ("picture_to_text", _num_ahead(pictures, texts, picture, text)),
        ("text_to_picture", _num_ahead(texts, pictures, text, picture)),
    ):
        result |= {f"{name}_recall_{k}": float(np.mean(ranks < k)) for k in RECALLS}
    if not num_classes:
        return result
    classes = prompts.reshape(num_classes, -1, prompts.shape[-1]).mean(1)
    classes /= np.maximum(np.linalg.norm(classes, axis=1, keepdims=True), 1e-12)
    [known] = np.nonzero(targets[:, 4] >= 0)
    result["zero_shot_pictures"] = float(len(known))
    if len(known):
        ahead = _num_ahead(embeddings[known, 0], classes, np.arange(len(known)), targets[known, 4])
        result["zero_shot_accuracy"] = float(np.mean(ahead == 0))
    return result


def _num_ahead(
    queries: np.ndarray, candidates: np.ndarray, query: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """Return for each query, [Q, E], how many wrong candidates, [C, E], are as near as its nearest
    right one or nearer: int64 [Q]. A tie counts as ahead, as nothing tells the two apart.

    query, right: int64 [n], the queries and candidates that belong together; every query has one.
    """
    order = np.argsort(query, kind="stable")
    query, right = query[order], right[order]
    found = []
    size = max(1, _BLOCK // len(candidates))
    for start in range(0, len(queries), size):
        scores = queries[start : start + size] @ candidates.T
        of_block = slice(*np.searchsorted(query, [start, start + size]))
        is_right = np.zeros(scores.shape, bool)
        is_right[query[of_block] - start, right[of_block]] = True
        best = np.max(scores, axis=1, where=is_right, initial=-np.inf)
        found.append(np.sum((scores >= best[:, None]) & ~is_right, axis=1))
    return np.concatenate(found)
