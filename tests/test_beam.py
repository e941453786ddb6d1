"""Beam search: against `transformers`, against all texts there are, and on meshes."""

import collections
import dataclasses
import itertools

import jax
import numpy as np
import pytest

from lm.generation.beam import BeamSearch
from lm.generation.generator import Generator
from lm.generation.sampling import Sampling
from lm.types import Tokens

torch = pytest.importorskip("torch")
llama_pair = pytest.importorskip("tests.llama_pair")

PROMPTS = [[5, 9, 20], [], [7] * 9, [3, 4, 3, 4, 11, 23]]
EARLY = (False, True, "never")


@pytest.fixture(scope="module")
def pair():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of so small a model, several only wait for each other
    yield llama_pair.make(seed=5)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def generator(pair):
    _, model, params = pair
    return Generator(model, params, llama_pair.Ids(24))


def theirs(model, prompt, limit, search):
    """[(ids, score)] of transformers."""
    ids = torch.tensor([[1, *prompt]])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        do_sample=False,
        num_beams=search.num_beams,
        length_penalty=search.length_penalty,
        early_stopping=search.early_stopping,
        num_return_sequences=search.num_samples,
        repetition_penalty=search.repetition_penalty,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = found.sequences[:, ids.shape[1] :].tolist()
    rows = [row[: row.index(2) + 1] if 2 in row else row for row in rows]
    return list(zip(rows, found.sequences_scores.tolist(), strict=True))


SEARCHES = [
    *(BeamSearch(2, 1.0, early, 2) for early in EARLY),
    *(BeamSearch(4, penalty, early, 3) for early in EARLY for penalty in (0.0, 2.5, -1.0)),
    *(BeamSearch(4, 1.0, early, 4, repetition_penalty=1.4) for early in EARLY),
]


def test_beams_are_those_of_transformers(pair, generator):
    ended = collections.Counter()
    for search in SEARCHES:
        made = generator.generate(PROMPTS, max_new_tokens=10, sampling=search)
        ended.update(m.finished for m in made)
        for i, prompt in enumerate(PROMPTS):
            expected = theirs(pair[0], prompt, 10, search)
            mine = [m for m in made if m.prompt == i]
            assert [m.ids.tolist() for m in mine] == [ids for ids, _ in expected], search
            np.testing.assert_allclose(
                [m.score for m in mine], [score for _, score in expected], rtol=2e-5, atol=2e-5
            )
    assert min(ended["eos"], ended["length"]) > 9


def test_settings_of_a_search_change_what_it_finds(generator):
    """Else the comparison above would say little."""
    found = set()
    for search in SEARCHES:
        search = dataclasses.replace(search, num_samples=2)
        made = generator.generate(PROMPTS, max_new_tokens=10, sampling=search)
        found.add(tuple(m.ids.tobytes() for m in made))
    assert len(found) > 6


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_texts_are_those_of_transformers(pair, generator, penalty):
    sampling = Sampling(temperature=0, repetition_penalty=penalty)
    for made in generator.generate(PROMPTS, max_new_tokens=10, sampling=sampling):
        ids = torch.tensor([[1, *PROMPTS[made.prompt]]])
        expected = pair[0].generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            repetition_penalty=penalty,
        )
        assert made.ids.tolist() == expected[0, ids.shape[1] :].tolist()


def test_enough_beams_find_the_likeliest_of_all_texts():
    _, model, params = llama_pair.make(seed=3, vocab_size=6)
    generator = Generator(model, params, llama_pair.Ids(6))
    search = BeamSearch(36, 0.0, "never", num_samples=9)  # more than prefixes of two tokens
    made = generator.generate([[4, 5]], max_new_tokens=3, sampling=search)
    texts = np.array(list(itertools.product(range(6), repeat=3)), np.int32)
    inputs = np.concatenate([np.tile([1, 4, 5], (len(texts), 1)), texts[:, :-1]], axis=1)
    tokens = Tokens(inputs, np.ones_like(inputs), np.tile(np.arange(5), (len(texts), 1)))
    logits = model.apply({"params": params}, tokens, method=lambda m, t: m.logits(m(t).hidden))
    logprobs = np.asarray(jax.nn.log_softmax(logits[:, 2:]))
    sums = {}
    for text, own in zip(texts.tolist(), logprobs, strict=True):
        cut = text[: text.index(2) + 1] if 2 in text else text
        sums[tuple(cut)] = sum(own[i, token] for i, token in enumerate(cut))
    best = sorted(sums, key=sums.__getitem__, reverse=True)[:9]
    assert [tuple(m.ids.tolist()) for m in made] == best
    for m in made:
        np.testing.assert_allclose(m.score, sums[tuple(m.ids.tolist())], atol=1e-5)
        np.testing.assert_allclose(m.logprobs.sum(), m.score, atol=1e-5)


def test_the_rest_of_the_batch_and_the_mesh_change_nothing(generator):
    search = BeamSearch(3, num_samples=3)
    together = generator.generate(PROMPTS, max_new_tokens=9, sampling=search)
    mesh = (("data", 2), ("tensor", 2))
    _, model, params = llama_pair.make(seed=5, mesh=mesh)
    spread = Generator(model, params, llama_pair.Ids(24))
    elsewhere = spread.generate(PROMPTS, max_new_tokens=9, sampling=search)
    alone = generator.generate(PROMPTS[2:3], max_new_tokens=9, sampling=search)
    for a, b in itertools.chain(
        zip(together, elsewhere, strict=True), zip(together[6:9], alone, strict=True)
    ):
        assert a.ids.tolist() == b.ids.tolist()
        np.testing.assert_allclose(a.score, b.score, atol=1e-5)


def test_one_compilation_serves_a_bucket(generator, caplog):
    def compiled(prompts, limit, **fields):
        caplog.clear()
        with jax.log_compiles():
            search = BeamSearch(5, **fields)
            generator.generate(prompts, max_new_tokens=limit, sampling=search)
        return [r for r in caplog.records if "Compiling jit(beam_search)" in r.getMessage()]

    assert len(compiled([[5], [6]], 9)) == 1
    fields = {"length_penalty": 2.0, "early_stopping": "never", "num_samples": 2}
    assert compiled([[7, 8, 9], [3]], 16, **fields) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_beams": 0},
        {"num_samples": 5},
        {"early_stopping": "always"},
        {"length_penalty": float("nan")},
        {"repetition_penalty": 0},
    ],
)
def test_a_search_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BeamSearch(**wrong)
    assert dataclasses.replace(BeamSearch(), num_beams=1).num_beams == 1
