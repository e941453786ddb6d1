"""Scores of given texts: against the whole forward pass of each, in batches and on meshes."""

import jax.numpy as jnp
import numpy as np
import pytest

from lm.generation import score
from lm.generation.generator import Generator
from lm.generation.sampling import Sampling
from lm.generation.score import Scorer, windows
from lm.tokenizers.tokenizer import ByteTokenizer
from tests.test_generate import model_and_params, uncached_logprobs

TOKENIZER = ByteTokenizer()
LENGTH = 32
SIZES = {"max_length": LENGTH, "positions": "learned"}


@pytest.fixture(scope="module")
def scorer():
    return Scorer(*model_and_params(**SIZES), TOKENIZER)


def expected(scorer, prompt, continuation):
    """(log-probability, is_greedy) from one forward pass for each token."""
    ids, total, greedy = [TOKENIZER.bos_id, *prompt], 0.0, True
    for token in continuation:
        logprobs = uncached_logprobs(scorer.model, scorer.params, ids[-LENGTH:])
        total += float(logprobs[token])
        greedy &= int(jnp.argmax(logprobs[: TOKENIZER.vocab_size])) == token
        ids.append(token)
    return total, greedy


def of_last(scorer, inputs, targets):
    """The sum of the log-probabilities of `targets`, that of the last one after all inputs."""
    first = len(inputs) - len(targets) + 1
    rows = [inputs[: first + i] for i in range(len(targets))]
    found = [np.asarray(uncached_logprobs(scorer.model, scorer.params, r)) for r in rows]
    return sum(float(own[t]) for own, t in zip(found, targets, strict=True))


PAIRS = [
    ([], [5]),
    ([1, 2, 3], [7, 8]),
    (list(range(12)), list(range(60, 79))),
    ([9], [7] * 17),
    ([4, 4], list(range(100, 130))),
]


def test_scores_are_those_of_the_whole_forward_pass(scorer):
    made = Generator(scorer.model, scorer.params, TOKENIZER).generate(
        [[65, 66]], max_new_tokens=6, sampling=Sampling(temperature=0)
    )
    pairs = [*PAIRS, ([65, 66], made[0].ids), ([65, 66], [*made[0].ids[:-1], 3])]
    seen = []
    scores = scorer.score(*zip(*pairs, strict=True), report=lambda *at: seen.append(at))
    for (prompt, continuation), found in zip(pairs, scores, strict=True):
        total, greedy = expected(scorer, prompt, continuation)
        assert (found.tokens, found.is_greedy) == (len(continuation), greedy)
        np.testing.assert_allclose(found.logprob, total, rtol=2e-5)
    assert [found.is_greedy for found in scores[-2:]] == [True, False]
    np.testing.assert_allclose(scores[-2].logprob, made[0].logprobs.sum(), rtol=2e-5)
    assert seen[-1] == (len(pairs), len(pairs)) and len(seen) > 1


def test_texts_are_scored_by_what_they_add_to_their_prompt(scorer):
    texts = scorer.score(["ab", ""], ["cd", "é"])
    ids = scorer.score([[97, 98], []], [[99, 100], [0xC3, 0xA9]])
    assert texts == ids


def test_a_prompt_that_is_too_long_loses_its_beginning(scorer):
    ids = list(np.random.default_rng(0).integers(0, 256, 50))
    [found] = scorer.score([ids], [[1, 2, 3]])
    assert scorer.score([ids[-30:]], [[1, 2, 3]]) == [found]
    [with_bos] = scorer.score([ids[-29:]], [[1, 2, 3]])
    total = of_last(scorer, np.array([*ids, 1, 2])[-LENGTH:], [1, 2, 3])
    np.testing.assert_allclose(found.logprob, total, rtol=2e-5)
    assert with_bos.logprob != found.logprob


def test_batches_chunks_and_meshes_change_no_score(scorer, monkeypatch):
    rng = np.random.default_rng(1)
    pairs = [(rng.integers(0, 256, n % 7), rng.integers(0, 256, 1 + n % 11)) for n in range(21)]
    reference = scorer.score(*zip(*pairs, strict=True))
    monkeypatch.setattr(score, "CHUNK_LOGITS", 3 * 264)  # not even the columns of one row
    mesh = (("data", 2), ("sequence", 2))
    spread = Scorer(*model_and_params(mesh, **SIZES), TOKENIZER, max_batch_tokens=80)
    for a, b in zip(reference, spread.score(*zip(*pairs, strict=True)), strict=True):
        np.testing.assert_allclose(a.logprob, b.logprob, rtol=2e-5)
        assert (a.tokens, a.is_greedy) == (b.tokens, b.is_greedy)


@pytest.mark.parametrize("context", [1, 5, 8])
@pytest.mark.parametrize("start", [(), (99,), (98, 99)])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 30])
def test_windows_score_every_token_once_after_what_came_before(start, count, context):
    ids = np.arange(count)
    found = windows(ids, np.array(start, int), 8, context)
    stream = [*start, *ids]
    scored = [int(t) for _, targets in found for t in targets]
    assert scored == stream[max(len(start), 1) :]
    at = max(len(start), 1)
    for i, (inputs, targets) in enumerate(found):
        assert len(inputs) <= 8
        assert list(inputs) == stream[: at + len(targets)][-len(inputs) - 1 : -1]
        before = len(inputs) - len(targets) + 1
        assert before >= context if i else before == max(len(start), 1)
        assert len(inputs) == 8 or len(found) == 1 or i < len(found) - 1
        at += len(targets)


def test_a_long_text_is_the_sum_of_its_windows(scorer):
    ids = np.random.default_rng(2).integers(0, 256, 80)
    [found, short] = scorer.rolling([ids, ids[:5]], context=9)
    parts = windows(ids, np.array([TOKENIZER.bos_id]), LENGTH, 9)
    total = sum(of_last(scorer, inputs, targets) for inputs, targets in parts)
    np.testing.assert_allclose(found.logprob, total, rtol=2e-5)
    assert (found.tokens, short.tokens) == (80, 5)
    np.testing.assert_allclose(short.logprob, expected(scorer, [], ids[:5])[0], rtol=2e-5)


@pytest.mark.parametrize(
    ("prompt", "continuation", "message"),
    [
        ([1], [], "continuation 0 must have at least 1"),
        ([1], [2] * 33, r"at most config.model.max_length \(32\).* it has 33"),
        ([1], [300], "id 300"),
    ],
)
def test_what_can_not_be_scored_is_refused(scorer, prompt, continuation, message):
    with pytest.raises(ValueError, match=message):
        scorer.score([prompt], [continuation])


def test_without_a_start_the_first_token_has_nothing_before_it(scorer):
    bare = Scorer(scorer.model, scorer.params, TOKENIZER, start=())
    with pytest.raises(ValueError, match="something before it"):
        bare.score([[]], [[5]])
    [found] = bare.score([[TOKENIZER.bos_id]], [[5]])
    assert found == scorer.score([[]], [[5]])[0]
