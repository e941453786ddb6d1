"""Encoder-decoder generation against `transformers`: T5 with random weights, token for token."""

import collections

import numpy as np
import pytest

from lm.generation.beam import BeamSearch
from lm.generation.generator import Generator
from lm.generation.sampling import Sampling
from tests import hf_models
from tests.test_hf import bring

torch = pytest.importorskip("torch", reason="parity needs PyTorch")
pytest.importorskip("transformers", reason="parity needs transformers")

PROMPTS = [[5, 77, 120, 9, 200], [33], list(range(40, 60)), [8, 8, 8]]
LIMIT = 12
SOURCE_END = 258  # the tokenizer's eos, which ends what the encoder reads
# (case, seed, the token that ends a text: one that this model often chooses)
CASES = [("t5", 5, 139), pytest.param(("t5_v1_1", 3, 80), marks=pytest.mark.slow)]
SEARCHES = [
    BeamSearch(3, 1.0, False, 3),
    BeamSearch(3, 0.0, True, 2),
    BeamSearch(3, 2.5, "never", 2),
    BeamSearch(3, -1.0, "never", 1),
    BeamSearch(3, 1.0, True, 3, repetition_penalty=1.6),
    BeamSearch(3, 0.6, False, 2, repetition_penalty=1.3),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0])
def sides(request, tmp_path_factory, devices):
    """(the model of transformers, a Generator of its import, the id that ends a text)."""
    name, seed, eos = request.param
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of so small a model, several only wait for each other
    # as many layers in both parts: transformers 5.24 takes the encoder's number for the cache's
    theirs = hf_models.make(name, seed, num_decoder_layers=2)
    folder = tmp_path_factory.mktemp(name)
    theirs.save_pretrained(folder / "theirs")
    own = bring(folder, theirs, devices)
    yield (
        theirs,
        Generator(own.experiment.model, own.params, own.experiment.tokenizer, stop_ids=[eos]),
        eos,
    )
    torch.set_num_threads(threads)


def texts(model, prompt, eos, **options):
    """(ids up to eos of each text, their scores) of transformers."""
    ids = torch.tensor([[*prompt, SOURCE_END]])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LIMIT,
        do_sample=False,
        eos_token_id=eos,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    rows = found.sequences[:, 1:].tolist()  # without the token that the decoder starts with
    rows = [row[: row.index(eos) + 1] if eos in row else row for row in rows]
    return rows, None if "num_beams" not in options else found.sequences_scores.tolist()


@pytest.mark.slow
def test_beams_of_t5_are_those_of_transformers(sides):
    theirs, generator, eos = sides
    ended, found = collections.Counter(), set()
    for search in SEARCHES:
        made = generator.generate(PROMPTS, max_new_tokens=LIMIT, sampling=search)
        ended.update(m.finished for m in made)
        found.add(tuple(m.ids.tobytes() for m in made if m.sample == 0))
        for i, prompt in enumerate(PROMPTS):
            rows, scores = texts(
                theirs,
                prompt,
                eos,
                num_beams=search.num_beams,
                num_return_sequences=search.num_samples,
                length_penalty=search.length_penalty,
                early_stopping=search.early_stopping,
                repetition_penalty=search.repetition_penalty,
            )
            mine = [m for m in made if m.prompt == i]
            assert [m.ids.tolist() for m in mine] == rows, search
            np.testing.assert_allclose([m.score for m in mine], scores, rtol=2e-5, atol=2e-5)
    assert min(ended["eos"], ended["length"]) > 4
    assert len(found) > 2  # else the settings would not matter here


@pytest.mark.parametrize("penalty", [1.0, 1.6])
def test_greedy_texts_of_t5_are_those_of_transformers(sides, penalty):
    theirs, generator, eos = sides
    sampling = Sampling(temperature=0, repetition_penalty=penalty)
    made = generator.generate(PROMPTS, max_new_tokens=LIMIT, sampling=sampling)
    for text, prompt in zip(made, PROMPTS, strict=True):
        rows, _ = texts(theirs, prompt, eos, repetition_penalty=penalty)
        assert [text.ids.tolist()] == rows
