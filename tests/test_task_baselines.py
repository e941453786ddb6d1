"""Predictions without a model, on a corpus that fits on a screen."""

import pytest

from lm.evaluation.task_baselines import BASELINES, NEED_TRAIN, OF_METRIC, sentences
from lm.evaluation.task_metrics import METRICS

PAIRS = [
    ("Good morning.", "早上好。"),
    ("I like tea.", "我喜欢茶。"),
    ("I like cats.", "我喜欢猫。"),
    ("You drink tea.", "你喝茶。"),
    ("You see cats.", "你看见猫。"),
    ("Good morning.", "早安。"),
    ("Good morning.", "早上好。"),
]


def predict(name, source, pairs=PAIRS):
    (found,) = BASELINES[name](pairs, [source])
    return found


def test_each_baseline_says_what_it_is_named_for():
    assert predict("copy", "I see.") == "I see."
    assert predict("majority", "anything") == "早上好。"
    assert predict("lead", "First, 3.5 m. Then more. And more.") == "First, 3.5 m."
    assert predict("lead", "目的 观察疗效.方法 略。结果好。") == "目的 观察疗效."
    assert predict("nearest", "tea, I drink") in ("我喜欢茶。", "你喝茶。")
    assert predict("nearest", "You drink coffee") == "你喝茶。"


def test_the_sentence_that_overlaps_with_the_question_answers_it():
    source = "question: Who wrote Emma? text: It rains. Jane Austen wrote Emma. Emma is a name."
    assert predict("overlap", source) == "Jane Austen wrote Emma."
    assert predict("overlap", "Who?") == "Who?"


def test_lookup_knows_whole_sources_and_puts_others_together_from_phrases():
    assert predict("lookup", "Good morning.") == "早上好。"
    # "i like" goes with 我喜欢 in two of two, tea with 茶, you with 你
    assert predict("lookup", "I like tea and cats.") == "我喜欢茶and猫。"


def test_sentences_end_at_points_that_are_no_decimals():
    assert sentences("It is 3.5 m. Really?\nYes！好。再见") == [
        "It is 3.5 m.", "Really?", "Yes！", "好。", "再见",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [n for n in BASELINES if n not in NEED_TRAIN])
def test_others_need_no_train(name):
    assert predict(name, "One. Two.", pairs=[]) in ("One. Two.", "One.", "Two.")


def test_every_metric_has_baselines_that_exist():
    assert set(OF_METRIC) == set(METRICS)
    assert {name for names in OF_METRIC.values() for name in names} == set(BASELINES)
