"""Metrics of tasks, by cases small enough to be counted by hand."""

import math

import pytest

from lm.evaluation import task_metrics
from lm.evaluation.task_metrics import METRICS, answers, bleu, classes, normalize, rouge, words


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  Cat sat, on a mat!", "cat sat on mat"),
        ("An apple-pie", "applepie"),  # SQuAD drops punctuation, and puts nothing in its place
        ("theatre", "theatre"),
        ("308 points", "308 points"),
        ("在1921年。", "在 1921 年"),
        ("ＡBC、日本", "ａbc 日 本"),
        ("the", ""),
    ],
)
def test_answers_have_the_normal_form_of_squad(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(
    "prediction, references, em, f1",
    [
        ("The cat", ["cat"], 100, 100),
        ("a black cat", ["cat"], 0, 200 / 3),  # shares 1 of 2 and 1
        ("black black cat", ["black black dog"], 0, 200 / 3),  # each as often as both have it
        ("dog", ["cat"], 0, 0),
        ("", ["cat"], 0, 0),
        ("the", ["a"], 100, 100),  # nothing is left of either
        ("1921", ["1922", "in 1921"], 0, 200 / 3),  # the best reference counts
        ("北京市", ["北京"], 0, 80),
    ],
)
def test_exact_match_and_f1(prediction, references, em, f1):
    assert answers([prediction], [references]) == pytest.approx({"EM": em, "F1": f1})


def test_exact_match_and_f1_are_means_over_answers():
    found = answers(["cat", "dog house"], [["cat"], ["house"]])
    assert found == pytest.approx({"EM": 50, "F1": (100 + 200 / 3) / 2})


def test_words_are_lower_case_and_chinese_characters_stand_alone():
    assert words("He's 3 years_old, 你好World") == [
        "he", "s", "3", "years", "old", "你", "好", "world",
    ]  # fmt: skip


def test_bleu_of_words():
    # 1- to 4-grams: 5 of 6, 3 of 5, 2 of 4, 1 of 3; no penalty for length
    found = bleu(["the cat sat on the mat"], [["the cat sat on a mat"]])
    assert found["BLEU"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert 0 < found["chrF"] < 100


def test_bleu_of_chinese_is_of_characters():
    # 6, 4, 3, 2 of 7, 6, 5, 4: one character differs
    found = bleu(["我在北京住了"], [["我在北京住着"]])
    assert found["BLEU"] == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert bleu(["我在北京"], [["我在北京"]]) == pytest.approx({"BLEU": 100, "chrF": 100})


def test_bleu_is_of_the_corpus_with_any_number_of_references():
    texts = ["one two three four five", "six seven eight nine ten"]
    references = [["one two three four five"], ["x", "six seven eight nine ten"]]
    assert bleu(texts, references)["BLEU"] == pytest.approx(100)
    short = bleu(["one two", "six seven eight nine ten"], references)
    assert short["BLEU"] == pytest.approx(100 * math.exp(1 - 10 / 7))  # brevity alone


def test_chrf_of_a_single_character_pair():
    # character 1-grams: 1 of 2 found, 1 of 2 wanted; 2-grams: none. Orders above the length have
    # none on either side and don't count; beta 2 of equal precision and recall 1/4 is 1/4.
    assert bleu(["ab"], [["ac"]])["chrF"] == pytest.approx(25)


def test_rouge_counts_ngrams_and_the_longest_common_subsequence():
    found = rouge(["The cat sat"], [["the cat, it sat"]])
    assert found == pytest.approx(
        {
            "ROUGE-1": 100 * 2 * (3 / 3) * (3 / 4) / (3 / 3 + 3 / 4),
            "ROUGE-2": 100 * 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3),
            "ROUGE-L": 100 * 2 * (3 / 3) * (3 / 4) / (3 / 3 + 3 / 4),
        }
    )


def test_rouge_of_chinese_is_of_characters():
    found = rouge(["水运工程管理"], [["工程管理"]])
    assert found["ROUGE-1"] == pytest.approx(100 * 2 * (4 / 6) / (4 / 6 + 1))
    assert found["ROUGE-2"] == pytest.approx(100 * 2 * (3 / 5) / (3 / 5 + 1))


def test_rouge_of_english_is_that_of_the_library():
    from rouge_score.rouge_scorer import RougeScorer

    pair = ("The model's loss fell by 3.5 points", "Losses of the model fell: 3.5%")
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(pair[1], pair[0])
    found = rouge([pair[0]], [[pair[1]]])
    assert list(found.values()) == pytest.approx([100 * s.fmeasure for s in theirs.values()])


def test_classes_weigh_the_same_whatever_their_size():
    #          a: 3 of 4 found, 3 of 5 right; b: 0 of 2 found; c: never in the references
    truth = ["a", "a", "a", "a", "b", "b"]
    found = classes(["a", "a", "a", "c", "a", "a"], [[t] for t in truth])
    assert found["accuracy"] == pytest.approx(50)
    assert found["balanced"] == pytest.approx(100 * (3 / 4 + 0) / 2)
    assert found["macro-F1"] == pytest.approx(100 * (2 * 3 / (4 + 5) + 0) / 2)


@pytest.mark.parametrize("name", METRICS)
def test_predictions_without_references_are_refused(name):
    with pytest.raises(ValueError, match="1 predictions for 2 records"):
        METRICS[name](["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="no reference"):
        METRICS[name](["a"], [[]])
    with pytest.raises(ValueError, match="one at least"):
        METRICS[name]([], [])


def test_a_class_with_two_references_is_refused():
    with pytest.raises(ValueError, match="one class"):
        task_metrics.classes(["a"], [["a", "b"]])
