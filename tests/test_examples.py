"""Records of tasks: what they are read from, and that no key is in train and in test."""

import json

import pytest

from lm.preparation import examples
from lm.preparation.corpus import Corpus, held_out
from lm.sources import Document, Skipped
from lm.sources.file_source import FileSource
from lm.storage import files as storage


def corpus(data, **columns):
    return Corpus(data=[str(data)], columns=columns, validation_fraction=0.0)


def documents(found):
    return [(e.key, e.document.fields) for e in found]


def records(folder, split):
    lines = storage.read_bytes(f"{folder}/{split}.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"text {i // 3}\tlabel {i}\n" for i in range(300)))
    return corpus(file, source="{1}", target="{2}")


def test_records_of_one_key_stay_together_and_none_is_lost(pairs, folder):
    found = examples.read(pairs, "records", "source")
    counts = examples.write(found, f"{folder}/", test_fraction=0.2, train_limit=0)
    split = {name: records(folder, name) for name in ("train", "test")}
    texts = {name: {r["source"] for r in found} for name, found in split.items()}
    assert not texts["train"] & texts["test"]
    assert texts["test"] == {f"text {i}" for i in range(100) if held_out(f"text {i}", 0.2)}
    assert 10 <= len(texts["test"]) <= 30
    assert len(split["train"]) + len(split["test"]) == 300
    assert counts["train"]["records"] == len(split["train"])
    assert split["test"][0].keys() == {"id", "source", "target"}


def test_a_key_is_where_it_was_when_other_records_come(pairs, tmp_path):
    file = tmp_path / "more.tsv"
    file.write_text("new\tx\n" + (tmp_path / "pairs.tsv").read_text())
    more = corpus(file, source="{1}", target="{2}")
    for name, found in (("a", pairs), ("b", more)):
        read = examples.read(found, "records", "source")
        examples.write(read, tmp_path / name, test_fraction=0.2, train_limit=0)
    test = [{r["source"] for r in records(tmp_path / name, "test")} - {"new"} for name in "ab"]
    assert test[0] == test[1]


def test_a_limit_draws_the_same_sample_of_train_and_leaves_test_alone(pairs, tmp_path):
    found = list(examples.read(pairs, "records", "source"))
    for name, limit, order in (("all", 0, 1), ("some", 20, 1), ("again", 20, -1)):
        examples.write(found[::order], tmp_path / name, test_fraction=0.2, train_limit=limit)
    ids = {
        name: {r["id"] for r in records(tmp_path / name, "train")}
        for name in ("all", "some", "again")
    }
    assert len(ids["some"]) == 20 and ids["some"] < ids["all"] and ids["again"] == ids["some"]
    assert records(tmp_path / "some", "test") == records(tmp_path / "all", "test")


def test_duplicates_and_what_is_no_record_are_counted(tmp_path):
    found = [
        examples.Example("a", Document("1", {"source": "x", "target": "y"})),
        examples.Example("a", Document("2", {"source": "x", "target": "y"})),
        examples.Example("a", Skipped("3", "malformed_json")),
        *(examples.Example(str(i), Document(str(i), {"source": str(i)})) for i in range(40)),
    ]
    counts = examples.write(found, tmp_path, test_fraction=0.3, train_limit=0)
    total = counts["train"] + counts["test"]
    assert (total["records"], total["duplicate"], total["malformed_json"]) == (41, 1, 1)
    with pytest.raises(ValueError, match="no record is left for test"):
        examples.write(found, tmp_path, test_fraction=0.0, train_limit=0)


def test_squad_is_read_by_paragraph_with_its_answers(tmp_path):
    def question(text, *found):
        return {"question": text, "id": text, "answers": [{"text": x} for x in found]}

    paragraphs = [
        {"context": "Rome fell.", "qas": [question("What?", "Rome", "the city", "Rome")]},
        {"context": "It rains.", "qas": [question("When?", "now"), question("Why?", "so")]},
    ]
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}))
    columns = {"source": "{question} text: {context}", "target": "answer", "all": "answers"}
    found = documents(examples.read(corpus(file, **columns), "squad"))
    assert found == [
        ("0/0", {"source": "What? text: Rome fell.", "target": "Rome", "all": "Rome\nthe city"}),
        ("0/1", {"source": "When? text: It rains.", "target": "now", "all": "now"}),
        ("0/1", {"source": "Why? text: It rains.", "target": "so", "all": "so"}),
    ]


def test_odd_questions_and_lost_records_are_counted(tmp_path):
    good = {"id": "1", "question": "q", "answers": [{"text": "a"}]}
    paragraphs = [{"context": "c", "qas": [good, {"id": "2", "question": "no answers"}]}]
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": paragraphs}, {}]}))
    found = list(examples.read(corpus(file, source="question", target="answer"), "squad"))
    assert [getattr(e.document, "reason", "") for e in found] == ["", "missing_field"]
    with pytest.raises(ValueError, match=r"1 of 2 .*50\.0%.*missing_field.*--max-loss=0\.5"):
        examples.write(found, tmp_path / "out", test_fraction=0.5, train_limit=0, max_loss=0.05)
    for content in ("{", "[]", '{"other": 1}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"squad\.json: no file of SQuAD's form"):
            list(examples.read(corpus(file, source="question"), "squad"))


def test_packages_are_snippets_of_files_below_folders(tmp_path):
    (tmp_path / "email" / "mime").mkdir(parents=True)
    (tmp_path / "top.py").write_text("x = 1\n" * 100)
    (tmp_path / "email" / "short.py").write_text("y = 1\n" * 29)
    lines = [f"z = {i}" for i in range(75)]
    (tmp_path / "email" / "mime" / "long.py").write_text("\n".join(lines))
    found = list(examples.read(corpus(tmp_path, source="text", target="package"), "packages"))
    assert [(e.key, e.document.id) for e in found] == [
        ("email/mime/long.py", "email/mime/long.py@0"),
        ("email/mime/long.py", "email/mime/long.py@30"),
    ]
    assert found[1].document.fields == {"source": "\n".join(lines[30:60]), "target": "email"}
    kept = examples.keep_labels(found, "target", {"xml"})
    assert not list(kept) and len(list(examples.keep_labels(found, "target", {"email"}))) == 2


def test_files_are_held_out_as_prepare_data_holds_them_out():
    """A model that is pretrained on the train store of the library has not seen test's files."""
    split = Corpus(data=["stdlib"], validation_fraction=0.25)
    names = {unit.name for unit in FileSource("stdlib", {"text": "text"}).units()}
    assert {n for n in names if split.split_of(n) == "validation"} == {
        n for n in names if held_out(n, 0.25)
    }


@pytest.mark.parametrize(
    ("form", "key", "message"),
    [
        ("table", "", "format 'table' must be one of records, squad, packages"),
        ("records", "label", r"key 'label' must be one of the fields \(source, target\)"),
        ("squad", "source", "squad and packages have their own"),
    ],
)
def test_formats_and_keys_are_checked(pairs, form, key, message):
    with pytest.raises(ValueError, match=message):
        list(examples.read(pairs, form, key))
