"""Filters of documents: quality, language, personal data, evaluation sets, near-duplicates."""

import itertools
import json
import pydoc_data.topics
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lm.preparation import filters
from lm.preparation.filters.minhash import MinHash
from lm.preparation.filters.ngrams import ngram_hashes, token_hashes
from lm.sources import Document, Skipped

GOOD = (
    "The harbour lies to the north of the old town, and the boats that come in at night have to "
    "wait for the tide. Most of the fishermen live with their families in small houses along the "
    "road. In winter, when storms keep them at home, they mend their nets and tell each other "
    "stories of the years before the bridge was built. \n"
    "A visitor should be there early in the morning to see the market. It opens at six, and by "
    "nine most of what was caught has been sold to the kitchens of the hotels. \n"
    "Nobody knows who laid the first stones of the wall that protects the quay. Some say it was "
    "the monks; others think that it is older than the church."
)
GERMAN = (
    "Der Hafen liegt nördlich der alten Stadt, und die Boote, die nachts einlaufen, müssen auf die "
    "Flut warten. Die meisten Fischer wohnen mit ihren Familien in kleinen Häusern an der Straße."
)
MARK = re.compile(r"\{\{(\w+):(.*?)\}\}")


def run(flag, text):
    return filters.load(flag)(Document("a", {"text": text}))


@pytest.mark.parametrize(
    "flag, bad, reason",
    [
        ("gopher_quality", "too short", "gopher_quality/short_doc"),
        ("gopher_repetition", "again and again\n" * 30, "gopher_repetition/dup_line_frac"),
        ("c4", GOOD + "\nif (x) { return y }, as the code has it.", "c4/curly_bracket"),
        ("fineweb", "a menu\nof links\n" * 9, "fineweb/line_punct_ratio"),
    ],
)
def test_rules_of_quality_keep_prose_and_drop_what_they_name(flag, bad, reason):
    assert run(flag, GOOD).id == "a"
    assert run(flag, bad) == Skipped("a", reason)


@pytest.mark.parametrize("flag", ["gopher_quality", "gopher_repetition", "c4", "fineweb"])
def test_quality_is_judged_as_by_datatrove(flag):
    import datatrove.data
    from datatrove.pipeline import filters as theirs

    from lm.preparation.filters.quality import _CLASSES

    step = getattr(theirs, _CLASSES[flag])()
    outcomes = Counter()
    for text in [GOOD, *itertools.islice(pydoc_data.topics.topics.values(), 12)]:
        document = datatrove.data.Document(text=text, id="")
        is_kept = step.filter(document) is True
        item = run(flag, text)
        assert isinstance(item, Document) == is_kept
        assert not is_kept or item.fields["text"] == document.text
        outcomes[is_kept] += 1
    assert len(outcomes) == 2  # some are kept, some dropped


def test_c4_removes_lines_and_keeps_the_rest():
    kept = run("c4", GOOD + "\nShare this page\nAccept cookies to go on, by our cookie policy.")
    assert kept.fields["text"] == "\n".join(line.strip() for line in GOOD.splitlines())


def test_languages_are_kept_by_name_and_dropped_by_theirs():
    assert isinstance(run("language keep=en", GOOD), Document)
    assert run("language keep=en", GERMAN) == Skipped("a", "language/de")
    assert isinstance(run("language keep=en,de", GERMAN), Document)
    assert run("language", "?! 12 %%").reason == "language/unsure"


def pii_cases():
    """Yield (text, the same with what is personal masked) of tests/pii.txt."""
    for line in (Path(__file__).parent / "pii.txt").read_text().splitlines():
        if not line.startswith("#"):
            yield MARK.sub(r"\2", line), MARK.sub(lambda m: f"<{m[1].upper()}>", line)


def test_personal_data_is_masked_on_the_open_list():
    """Precision and recall over the list, which docs/corpora.md states."""
    right, masked, planted = Counter(), Counter(), Counter()
    for text, wanted in pii_cases():
        found = run("pii", text).fields["text"]
        for kind in ("EMAIL", "PHONE", "CARD", "IP", "ID"):
            there, here = wanted.count(f"<{kind}>"), found.count(f"<{kind}>")
            right[kind] += min(there, here)
            masked[kind] += here
            planted[kind] += there
    print({kind: (right[kind], masked[kind], planted[kind]) for kind in planted})
    assert sum(right.values()) / sum(masked.values()) > 0.95  # precision
    assert sum(right.values()) / sum(planted.values()) > 0.92  # recall
    assert all(right[kind] / planted[kind] > 0.85 for kind in planted)


def test_masks_are_counted_and_masking_again_changes_nothing():
    text = "a.b@c.org or d@e.net, 192.168.0.1, 93.184.216.34, 4111 1111 1111 1111, (212) 736-5000"
    item = run("pii", text)
    assert item.fields["text"] == "<EMAIL> or <EMAIL>, 192.168.0.1, <IP>, <CARD>, <PHONE>"
    assert item.masked == (("card", 1), ("email", 2), ("ip", 1), ("phone", 1))
    assert filters.load("pii")(item) == item
    assert run("pii kinds=ip,email", text).masked == (("email", 2), ("ip", 1))
    assert run("pii", "Nothing.").masked == ()
    assert run("pii", "Order 6502530000, release 4.3.2.1").masked == ()
    assert run("pii", "Call 6502530000.").fields["text"] == "Call <PHONE>."


def test_personal_data_is_looked_for_in_time_linear_in_the_text():
    encoded = "@" + "".join(random.Random(0).choices("abcXYZ0189+/=.-", k=300_000))
    start = time.monotonic()
    run("pii kinds=email,id,card,ip", encoded)
    assert time.monotonic() - start < 10  # datatrove's pattern of e-mail takes minutes


@pytest.mark.parametrize(
    "flag, error",
    [
        ("fine_web", "no filter; there are: .*did you mean fineweb"),
        ("", "no filter"),
        ("c4 'x", "No closing quotation"),
        ("c4 min_sentences=3", "'min_sentences' is no parameter.*did you mean min_num_sentences"),
        ("c4 sentences", "'sentences' is no parameter KEY=VALUE"),
        ("gopher_quality min_doc_words=few", "min_doc_words=few is no int such as 50"),
        ("language keep", "write keep=..."),
        ("language min_probability=7", r"min_probability \(7\) must be in \[0, 1\]"),
        ("language keep=en,xx", "keep: 'xx' is none of"),
        ("pii kinds=mail", "kinds: 'mail' is none of email"),
        ("pii regions=England", "'England' is no country's code"),
        ("decontaminate", "name the evaluation sets"),
        ("decontaminate data=x n=3", r"min_words \(8\) must be in \[1, n \(3\)\]"),
        ("no.such.module", "finds no module no"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(flag, error):
    with pytest.raises(ValueError, match=error) as raised:
        filters.load(flag)
    assert "\n" not in str(raised.value) and "--filter" in str(raised.value)


def test_a_filter_of_ones_own_that_fails_is_named_with_the_document(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "filters.py").write_text(
        "def build(*, mode: str):\n"
        "    def keep(document):\n"
        "        return {'raise': lambda: 1 / 0, 'none': lambda: None}[mode]()\n"
        "    return keep\n"
    )
    (tmp_path / "own" / "open.py").write_text("def build(**given):\n    return lambda d: d\n")
    monkeypatch.syspath_prepend(tmp_path)
    document = Document("a.txt@0", {"text": "x"})
    with pytest.raises(
        ValueError, match=r"mode=raise' failed on a.txt@0: ZeroDivisionError: division by zero"
    ):
        filters.load("own.filters mode=raise")(document)
    with pytest.raises(ValueError, match=r"mode=none' made NoneType of a.txt@0"):
        filters.load("own.filters mode=none")(document)
    with pytest.raises(ValueError, match="must name its parameters"):
        filters.load("own.open x=1")


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "stdnum", None)
    monkeypatch.delitem(sys.modules, "stdnum.luhn", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"needs python-stdnum: pip install 'lm\[data\]'"):
        filters.installed("stdnum.luhn", "python-stdnum")


def test_the_identity_has_defaults_versions_and_a_hash_of_evaluation_sets(tmp_path):
    (tmp_path / "set.txt").write_text(GOOD)
    flag = f"decontaminate data={tmp_path}/set.txt"
    identity = filters.identity(flag)
    assert identity["parameters"]["n"] == 13
    assert json.loads(json.dumps(identity)) == identity
    (tmp_path / "set.txt").write_text(GOOD + " One more sentence makes it another set of texts.")
    filters._build.cache_clear()
    assert filters.identity(flag)["inputs"] != identity["inputs"]
    assert filters.identity("c4")["versions"].keys() == {"datatrove", "spacy"}


def test_tokens_are_words_and_characters_of_scripts_without_spaces():
    def same(a, b):
        return np.array_equal(token_hashes(a), token_hashes(b))

    assert len(token_hashes("Hello, big WORLD! 3.5")) == 5
    assert same("Hello, big WORLD!", "hello big\n(world)")
    assert same("ｈｅｌｌｏ ﬁsh", "hello fish")  # width and ligatures
    assert len(token_hashes("你好吗？ สวัส")) == 7 and same("你好吗", "你 好、吗")
    assert len(token_hashes("हिन्दी भाषा")) == 2  # marks are of their word
    assert not same("ab a", "a ba") and not same("a b", "b a")
    assert len(token_hashes(" … ")) == 0 == len(ngram_hashes(token_hashes("a b"), 3))


def test_long_texts_are_hashed_in_blocks_that_cut_no_word(monkeypatch):
    text = " ".join(GOOD.split() * 3) + "字" * 50 + "x" * 100
    whole = token_hashes(text)
    monkeypatch.setattr("lm.preparation.filters.ngrams._BLOCK", 7)
    assert np.array_equal(token_hashes(text), whole)


def evaluation_set(folder, rng, words, count):
    items = [
        {"question": " ".join(rng.choices(words, k=25)), "answer": "yes"} for _ in range(count)
    ]
    file = folder / "arc.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    return file, [item["question"] for item in items]


def test_planted_contamination_is_found_with_its_item_and_position(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=6)) for _ in range(3000)]
    file, items = evaluation_set(tmp_path, rng, words, 50)
    flag = f"decontaminate data={file} columns=question,answer"
    for i, item in enumerate(items):
        part = item.split()[5:18]  # 13 words
        before, after = rng.choices(words, k=i), rng.choices(words, k=9)
        found = run(flag, ", ".join([*before, *part, *after]).upper())
        assert found.reason == f"decontaminate/{file}"
        assert re.fullmatch(
            rf"13-gram [0-9a-f]{{16}} at word {i} of text is in arc.jsonl@\d+; 1 match",
            found.detail,
        )
        assert isinstance(run(flag, " ".join([*before, *part[:12], *after])), Document)
    innocent = [run(flag, " ".join(rng.choices(words, k=400))) for _ in range(300)]
    assert all(isinstance(item, Document) for item in innocent)


def test_short_items_are_looked_for_as_a_whole_from_8_words_on(tmp_path):
    short = "one two three four five six seven"
    (tmp_path / "set.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (short, short + " eight"))
    )
    flag = f"decontaminate data={tmp_path}/set.jsonl"
    assert isinstance(run(flag, f"He counts {short}."), Document)
    assert run(flag, f"He counts {short} eight nine.").detail.startswith("8-gram")
    with pytest.raises(ValueError, match=r"no item of data=.* has min_words \(9\) words"):
        filters.load(f"{flag} min_words=9")


def near_duplicate(tokens, similarity, rng, words):
    """Return the tokens with words replaced as long as the Jaccard similarity of the 5-grams is at
    least `similarity`, and that similarity.
    """
    own, changed, found = five_grams(tokens), list(tokens), 1.0
    while True:
        tried = list(changed)
        tried[rng.randrange(len(tried))] = rng.choice(words)
        other = five_grams(tried)
        if (next_found := len(own & other) / len(own | other)) < similarity:
            return changed, found
        changed, found = tried, next_found


def five_grams(tokens):
    return {tuple(tokens[i : i + 5]) for i in range(len(tokens) - 4)}


def share_found(similarity, count):
    """Return the share of pairs of at least this similarity that have a key of MinHash() in common,
    and the share that the formula expects.
    """
    rng, hashing = random.Random(0), MinHash()
    words = ["".join(rng.choices("abcdefghijklm", k=rng.randint(2, 8))) for _ in range(5000)]
    found, expected = 0, 0.0
    for _ in range(count):
        tokens = rng.choices(words, k=300)
        other, exact = near_duplicate(tokens, similarity, rng, words)
        found += bool((hashing.keys(" ".join(tokens)) == hashing.keys(" ".join(other))).any())
        expected += 1 - (1 - exact**hashing.rows) ** hashing.bands
    return found / count, expected / count


def test_near_duplicates_share_a_key_and_others_do_not():
    assert share_found(0.8, 100)[0] >= 0.95
    assert share_found(0.3, 100)[0] <= 0.05


@pytest.mark.slow
def test_keys_are_shared_as_the_formula_of_minhash_says():
    for similarity in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        measured, expected = share_found(similarity, 2000)
        print(f"similarity {similarity}: {measured:.4f} share a key, {expected:.4f} expected")
        assert abs(measured - expected) < 0.03
        assert similarity < 0.8 or measured >= 0.95


def test_keys_depend_on_the_words_alone():
    keys = MinHash().keys(GOOD)
    assert keys.shape == (20,) and keys.dtype == np.uint64
    assert np.array_equal(MinHash().keys(GOOD.upper().replace(" ", "\n")), keys)
    assert len(set(keys.tolist())) == 20
    assert not (MinHash(seed=1).keys(GOOD) == keys).any()
    assert MinHash().keys("?!").shape == (0,)
    assert (MinHash().keys("Two words") == MinHash().keys("two: words")).all()
    chinese = "港口位于老城的北面夜里进港的船要等涨潮大多数渔民同家人住在路边的小屋里"
    changed = chinese.replace("夜里", "晚上", 1)
    assert (
        MinHash(bands=50, rows=3).keys(chinese) == MinHash(bands=50, rows=3).keys(changed)
    ).any()
    with pytest.raises(ValueError, match=r"--near-duplicates.bands \(0\) must be at least 1"):
        MinHash(bands=0)
