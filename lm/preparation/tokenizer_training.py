"""Training of SentencePiece models that are lossless, byte for byte, and of word vocabularies."""

import collections
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator

from lm.preparation.corpus import Corpus, held_out, key_hash
from lm.preparation.parts import plan_parts, read_part
from lm.sources import Document, Skipped, Unit
from lm.sources.records import column_names
from lm.storage import files as storage
from lm.storage.paths import expand_path
from lm.tokenizers.tokenizer import LONG_TEXT, split_long_text

_LINE = re.compile(r"(?<!\n)(?=\n)")  # before the first of several newlines
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
NUM_SPECIAL, NUM_BYTES = 4, 256  # pieces that every vocabulary has
COVERAGE = 0.9999  # share of the text whose characters are pieces
_READ = 8  # times the sample, at most
_MIN_UNITS = 16  # that a sample of a larger corpus is from
UNKNOWN_WORD, END_OF_LINE = "<unk>", "<eos>"


def training_texts(corpus: Corpus, *, sample_bytes: int) -> Iterator[str]:
    """Yield texts of the train split, without duplicates, about `sample_bytes` of them in all.

    The sample takes documents by a hash of their id, spread over the whole corpus; of a corpus of
    more than `_READ` times as much, from units that a hash of their names chooses, and of each the
    first bytes alone, so that no more than that is read.
    Raises ValueError where there is none, with the reasons why records were skipped.
    """
    units = _sampled_units(corpus, _READ * sample_bytes)
    share = sample_bytes / max(sum(limit for *_, limit in units), 1)
    seen, size = set(), 0
    skipped: collections.Counter[str] = collections.Counter()
    fields: dict[str, None] = {}
    for source, unit, limit in units:
        num_read = 0
        for item, digest in read_part(corpus, [(source, unit)]):
            if isinstance(item, Skipped):
                skipped[item.reason] += 1
                fields |= dict.fromkeys(item.fields)
                continue
            num_read += sum(map(len, item.fields.values()))
            if digest not in seen and held_out(f"sample:{item.id}", share):
                for split, part in corpus.assign(item):
                    if split == "train" and isinstance(part, Document):
                        seen.add(digest)
                        for text in part.fields.values():
                            size += len(text.encode())
                            yield text
            if size >= sample_bytes:  # compressed files hold more than their sizes say
                return
            if limit < unit.size and num_read >= limit:
                break
    if not size:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in skipped.items()) or "nothing"
        error = f"no text to train a tokenizer on in {', '.join(corpus.data)}; skipped: {reasons}"
        if fields:
            error += (
                f". Records have the fields {', '.join([*fields][:20])} and not "
                f"{', '.join(column_names(corpus.columns))}: say "
                f"--field={next(iter(corpus.columns))}={next(iter(fields))}"
            )
        raise ValueError(error)


def _sampled_units(corpus: Corpus, num_bytes: int) -> list[tuple[int, Unit, int]]:
    """Return (number of the source, unit, bytes of it to read) in order: all units of a corpus of
    `num_bytes` or less, else some that have as many together.
    """
    units = list(itertools.chain.from_iterable(plan_parts(corpus.sources())))
    if sum(unit.size for _, unit in units) <= num_bytes:
        return [(source, unit, unit.size) for source, unit in units]
    most = max(num_bytes // _MIN_UNITS, 1)
    left, chosen = num_bytes, []

    def order(i: int) -> int:  # not by the stamp: a copy of the files gives the same tokenizer
        source, unit = units[i]
        return key_hash(f"sample:{source}:{unit.name}:{unit.start}")

    for i in sorted(range(len(units)), key=order):
        if left <= 0:
            break
        chosen.append((i, min(units[i][1].size, most)))
        left -= chosen[-1][1]
    return [(*units[i], limit) for i, limit in sorted(chosen)]


def train_sentencepiece(
    texts: Iterable[str],
    *,
    vocab_size: int,
    model_type: str = "bpe",
    piece_span: str = "line",
    split_digits: bool = False,
    vocab_flag: str = "--vocab-size",
) -> bytes:
    """Return the SentencePiece model trained on `texts`: the same texts give the same bytes.

    Normalisation is the identity, without dummy prefix; bytes stand in for characters outside the
    vocabulary; pieces may mix letters, digits and punctuation and may be white space.

    piece_span: "word", a piece begins at a space or continues a word; "line", it may span words of
    a line, with the newlines and the indentation before it (bytes per token of Python's standard
    library, BPE of 4,096 pieces: 3.67 and 4.35).

    Where 99.99% of the text needs characters for more than half of the vocabulary, as Chinese does
    (unigram: for more than all of it), the most frequent ones get that half and the others are
    written in bytes. Bytes per token of a Chinese novel, 4,096 pieces: 4.07 with a quarter of them
    for characters, 4.40 with half, 4.22 with three quarters.

    vocab_flag: the flag that a user sets `vocab_size` with, for the error.

    Raises ValueError where the texts cannot fill the vocabulary.
    """
    import sentencepiece

    texts = list(texts)
    room = max(vocab_size - NUM_BYTES - NUM_SPECIAL, 0)
    # unigram chooses among the pieces that it finds, which in little text are few beside characters
    rare = _rare_characters(texts, room // 2 if model_type == "bpe" else room, room // 2)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, piece_span, rare),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            split_digits=split_digits,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            split_by_whitespace=piece_span == "word",
            split_by_unicode_script=False,
            max_sentencepiece_length=32,
            character_coverage=COVERAGE,
            max_sentence_length=4 * LONG_TEXT,  # bytes; SentencePiece drops longer ones
            num_threads=16,  # a constant: unigram's sums depend on it
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        text = str(error).splitlines()[-1]
        most = re.search(r"value <= (\d+)", text)
        raise ValueError(
            f"{sum(map(len, texts)):,} characters of text give at most {int(most[1]):,} "
            f"{model_type} pieces, not {vocab_size:,}: give more text, or {vocab_flag}={most[1]}"
            if most
            else f"SentencePiece cannot train {vocab_size} {model_type} pieces on these texts: "
            f"{text}; change {vocab_flag} or give more text"
        ) from error
    return model.getvalue()


def _rare_characters(texts: Iterable[str], room: int, most: int) -> dict[int, str]:
    """Return a table for `str.translate` from all but the `most` most frequent characters to "\\0";
    empty where `room` of them cover the texts.
    """
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(text)
    ordered = sorted(counts, key=lambda character: (-counts[character], character))
    if sum(counts[character] for character in ordered[:room]) >= COVERAGE * counts.total():
        return {}
    return dict.fromkeys(map(ord, ordered[most:]), "\0")


def _sentences(texts: Iterable[str], piece_span: str, rare: dict[int, str]) -> Iterator[str]:
    """Yield the parts of texts that no piece spans; they have no rare characters."""
    for text in texts:
        for line in [text] if piece_span == "word" else _LINE.split(text):
            for part in line.translate(rare).split("\0") if rare else [line]:
                yield from split_long_text(part)


def train_words(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Return the `tokenizer.json` of the `vocab_size` most frequent words of `texts`, or of all.

    Words are separated by white space; every line and document ends with the token <eos>, as in the
    language modelling benchmarks (Penn Treebank, WikiText). The words <unk> and <eos> of a text are
    these tokens; a word outside of the vocabulary is <unk>.
    """
    import tokenizers

    eos = tokenizers.normalizers.Replace("\n", f" {END_OF_LINE} ")
    split = tokenizers.pre_tokenizers.WhitespaceSplit()
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        for part in split_long_text(text):
            words = split.pre_tokenize_str(eos.normalize_str(part))
            counts.update(word for word, _ in words)
    special = [UNKNOWN_WORD, END_OF_LINE]
    frequent = sorted(counts.keys() - special, key=lambda word: (-counts[word], word))
    words = [*special, *frequent][:vocab_size]
    vocab = {word: i for i, word in enumerate(words)}
    model = tokenizers.models.WordLevel(vocab, unk_token=UNKNOWN_WORD)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = eos, split
    tokenizer.add_special_tokens([END_OF_LINE])
    return tokenizer.to_str().encode()


def train_tokenizer(
    corpus: Corpus,
    *,
    out: str | os.PathLike,
    vocab_size: int,
    model_type: str,
    piece_span: str,
    split_digits: bool,
    sample_bytes: int,
    vocab_flag: str = "--vocab-size",
) -> int:
    """Write a model trained on the train split to `out`; return the size of its texts in bytes.

    model_type: bpe or unigram (SentencePiece), or word, without subwords.
    """
    out = expand_path(os.fspath(out), "--out").rstrip("/")
    suffix = ".json" if model_type == "word" else ".model"
    if not out.endswith(suffix):
        raise ValueError(
            f"--out={out} must end in {suffix}, by which a file of --model-type={model_type} is "
            "known"
        )
    if os.path.isdir(out):
        raise ValueError(f"--out={out} is a folder, not a file")
    storage.make_folder(os.path.dirname(out) or ".")  # before the work, not after it
    texts = list(training_texts(corpus, sample_bytes=sample_bytes))
    if model_type == "word":
        model = train_words(texts, vocab_size=vocab_size)
    else:
        model = train_sentencepiece(
            texts,
            vocab_size=vocab_size,
            model_type=model_type,
            piece_span=piece_span,
            split_digits=split_digits,
            vocab_flag=vocab_flag,
        )
    storage.write_atomically(out, model)
    return sum(len(text.encode()) for text in texts)
