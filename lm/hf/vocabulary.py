"""Tokenizers of a folder in Hugging Face's layout: copied to a run, and written for `transformers`.

A run's tokenizer is one file. The files beside it that `transformers` reads (chat templates, names
of special tokens) are copied with it. A text starts with `bos_id` here, in training; a vocabulary
without one (GPT-2, Qwen) starts it with the token that ends documents, as in its own training.
Generation starts it as the published files say: with nothing, where they say that there is no bos.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lm.hf.files import check_pointer, read_json
from lm.hf.keys import Json, Say
from lm.storage.epaths import StoragePath
from lm.tokenizers import special_tokens
from lm.tokenizers import tokenizer as tokenizers
from lm.tokenizers.huggingface_tokenizer import byte_level_alphabet
from lm.tokenizers.run_tokenizer import COMPANION_FILES
from lm.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from lm.tokenizers.tokenizer import ByteTokenizer, Tokenizer

if TYPE_CHECKING:
    from tokenizers.processors import TemplateProcessing

WHOLE = ("tokenizer.json", "tokenizer.model", "spiece.model")
# A conversion must give the ids of the original on all of these; not on the names of special
# tokens, which `transformers` never takes for text.
PROBES = (
    *("", " ", "  ", "a", " a", "  a  b ", "Hello world", "Hello, y'all! How are you 😁 ?"),
    *("\n\n\ta", "don't 3.14159 == 10_000", "ünïcödé naïve café", "日本語の文 漢字", "привет мир"),
    *("🦙🚀 ok", "x\r\ny", "ﬁne ½ Ａ", "    indented\n        code", "\u0001"),
)


def copy_tokenizer(folder: Path, to: StoragePath) -> StoragePath:
    """Copy the tokenizer of `folder`, or make it of the files there, and return the file in `to`.

    Raises:
        FileNotFoundError: `folder` has no tokenizer.
    """
    vocab, merges, words = (folder / n for n in ("vocab.json", "merges.txt", "vocab.txt"))
    name = next((name for name in WHOLE if (folder / name).exists()), WHOLE[0])
    if (folder / name).exists():
        check_pointer(folder / name)
        content = (folder / name).read_bytes()
    elif vocab.exists() and merges.exists():
        content = _from_merges(vocab, merges)
    elif words.exists():
        content = _from_words(words)
    else:
        raise FileNotFoundError(
            f"{folder} has no tokenizer: none of {', '.join(WHOLE)}, vocab.json with merges.txt, "
            "vocab.txt; give --tokenizer=FILE (or --tokenizer=bytes)"
        )
    to.mkdir(parents=True, exist_ok=True)
    for file_name, data in {name: content, **_companions(folder)}.items():
        (to / file_name).write_bytes(data)
    return to / name


def _companions(folder: Path | StoragePath) -> dict[str, bytes]:
    """The content of the files beside a tokenizer."""
    return {n: (folder / n).read_bytes() for n in COMPANION_FILES if (folder / n).exists()}


def _from_merges(vocab: Path, merges: Path) -> bytes:
    """The tokenizer.json of GPT-2's byte-level BPE files."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    made.add_special_tokens([AddedToken("<|endoftext|>", normalized=True, special=True)])
    return made.to_str().encode()


def _from_words(words: Path) -> bytes:
    """The tokenizer.json of BERT's vocab.txt."""
    from tokenizers import AddedToken
    from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer

    path = words.parent / "tokenizer_config.json"
    lower = read_json(path).get("do_lower_case", True) if path.exists() else True
    made = BertWordPieceTokenizer(str(words), lowercase=lower)
    special = [
        t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if made.token_to_id(t) is not None
    ]
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    return made.to_str().encode()


def compare(tokenizer: Tokenizer, tree: Json, say: Say) -> None:
    """Note where a config.json names other special tokens than the tokenizer has."""
    for name in ("bos", "eos"):
        wanted, found = tree.get(f"{name}_token_id"), getattr(tokenizer, f"{name}_id")
        wanted = wanted if isinstance(wanted, list) else [] if wanted is None else [wanted]
        if wanted and found not in wanted:
            say(f"note: {name} is token {found} here, config.json says {wanted}")
    if not tokenizer.file_name.endswith(".json"):
        return
    import tokenizers as library

    ids = library.Tokenizer.from_str(tokenizer.model.decode()).encode("a").ids
    start = tokenizer.start_ids
    if start and tuple(ids[: len(start)]) != start:
        say(
            f"note: a text begins with token {start[0]} here; tokenizer.json puts "
            f"{ids[0] if len(ids) > 1 else 'nothing'} before it"
        )


def special_ids(tokenizer: Tokenizer, *, is_encoder_decoder: bool) -> Json:
    """The keys of config.json for special tokens, those of the published model if there is one."""
    if tokenizer.file_name:
        published = special_tokens.read(StoragePath(tokenizer.name).parent).model
        if special_tokens.is_published(published):
            return {key: published[key] for key in special_tokens.IDS if key in published}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    return ids | ({"decoder_start_token_id": tokenizer.bos_id} if is_encoder_decoder else {})


def export(tokenizer: Tokenizer, folder: Path, *, max_length: int) -> None:
    """Write the files with which AutoTokenizer gives the ids of `tokenizer`.

    Raises:
        ValueError: a SentencePiece model that the `tokenizers` library can't represent.
    """
    beside = {} if tokenizer.name == "bytes" else _companions(StoragePath(tokenizer.name).parent)
    beside.pop(special_tokens.MODEL_FILE, None)  # the model's own is written
    for name, content in beside.items():
        (folder / name).write_bytes(content)
    if isinstance(tokenizer, SentencePieceTokenizer):
        content = _from_sentencepiece(tokenizer)
        (folder / tokenizer.file_name).write_bytes(tokenizer.model)
    else:
        content = _from_bytes() if isinstance(tokenizer, ByteTokenizer) else tokenizer.model
    (folder / WHOLE[0]).write_bytes(content)
    if "tokenizer_config.json" not in beside:
        names = {token["id"]: token["content"] for token in json.loads(content)["added_tokens"]}
        special = {
            f"{n}_token": names.get(getattr(tokenizer, f"{n}_id")) for n in ("bos", "eos", "pad")
        }
        tree = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
            **special,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(tree, indent=2))


def _from_bytes() -> bytes:
    """The tokenizer.json of the byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = byte_level_alphabet()
    made = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(  # pyright: ignore
        add_prefix_space=False, use_regex=False
    )
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    made.add_special_tokens(["<pad>", "<s>", "</s>"])  # 256, 257, 258
    made.post_processor = _start_token("<s>", ByteTokenizer.bos_id)  # pyright: ignore
    return made.to_str().encode()


def _start_token(token: str, i: int) -> TemplateProcessing:
    """A post-processor that puts a token before every text."""
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, i)]
    )


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> bytes:
    """The tokenizer.json that gives the ids of a SentencePiece model.

    The converter of `transformers` does this too, but exporting must not need `transformers`;
    `SentencePieceUnigramTokenizer.from_spm` of `tokenizers` knows no BPE.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)  # pyright: ignore
    spec, trained = proto.normalizer_spec, proto.trainer_spec
    pieces = [(p.piece, p.score) for p in proto.pieces]
    kinds = {p.piece: p.type for p in proto.pieces}
    normal, control, user, fallback = 1, 3, 4, trained.byte_fallback
    unknown = next(i for i, p in enumerate(proto.pieces) if p.type == 2)
    if trained.model_type == 1:
        model: models.Model = models.Unigram(pieces, unk_id=unknown, byte_fallback=fallback)
    elif trained.model_type == 2:
        merges = _merges({p: s for p, s in pieces if kinds[p] == normal})
        vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
        model = models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=pieces[unknown][0],
            fuse_unk=True,
            byte_fallback=fallback,
        )
    else:
        raise ValueError(
            f"{tokenizer.name} is neither a BPE nor a unigram model: it can't be exported"
        )
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("\u2581"))
    steps.append(normalizers.Replace(" ", "\u2581"))
    ends = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    ends += [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence(steps)  # pyright: ignore
    made.decoder = decoders.Sequence(ends)  # pyright: ignore
    made.add_special_tokens(
        [AddedToken(p, special=True) for p, _ in pieces if kinds[p] in (control, 2)]
    )
    made.add_tokens([AddedToken(p, normalized=False) for p, _ in pieces if kinds[p] == user])
    bos = pieces[tokenizer.bos_id][0]
    made.post_processor = _start_token(bos, tokenizer.bos_id)  # pyright: ignore
    content = made.to_str().encode()
    _check(content, tokenizer)
    return content


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of vocabulary entries whose concatenation is one, in SentencePiece's merge order."""
    order = {piece: i for i, piece in enumerate(scores)}
    pairs = [(piece[:cut], piece[cut:]) for piece in scores for cut in range(1, len(piece))]
    found = [pair for pair in pairs if pair[0] in scores and pair[1] in scores]
    return sorted(found, key=lambda pair: (-scores["".join(pair)], *(order[p] for p in pair)))


def _check(content: bytes, tokenizer: Tokenizer) -> None:
    """Raise ValueError unless a tokenizer.json gives the ids of `tokenizer` on the probes."""
    made = tokenizers.from_bytes(WHOLE[0], content)
    for text in PROBES:
        wanted, found = tokenizer.encode(text).tolist(), made.encode(text).tolist()
        if wanted != found:
            raise ValueError(
                f"{tokenizer.name} can't be written as tokenizer.json: {text!r} is {wanted} in the "
                f"one and {found} in the other"
            )
