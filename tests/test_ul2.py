"""The mixture of denoisers: what each does to a row, how often it is chosen, and its mode token."""

import numpy as np
import pytest

from lm.objectives import ModelInterface, ul2
from lm.tokenizers.tokenizer import ByteTokenizer
from tests.test_span_corruption import make_rows, parts, pieces, rebuilt

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.eos_id
R, S, X = 260, 261, 262
FORM = ModelInterface(256, vocab_size=400)


def generator(i):
    return np.random.default_rng([0, 0, i])


def build(form=FORM, **config):
    return ul2.build(ul2.Config(**config), TOKENIZER, form)


def row_parts(objective, count, length=None):
    raw = objective.layout.length
    rows = make_rows([[length or raw + 50] * 3] * count, raw)
    return rows, objective(rows, generator)


def test_s_hides_the_end_and_x_half_of_the_text():
    rows, batch = row_parts(build(denoisers=(("S", 0.25, 0.0),)), 20)
    for r in range(20):
        [(source, target)] = parts(batch, r).values()
        [_, (_, hidden)] = pieces(target)
        text = rows.ids[r].tolist()
        assert text[len(text) - len(hidden) :] == hidden
        assert len(hidden) / len(text) == pytest.approx(0.25, abs=0.01)
        assert rebuilt(source, target) == text
    rows, batch = row_parts(build(denoisers=(("X", 0.5, 3.0),)), 20)
    hidden = ((batch.targets < EOS) & (batch.weights > 0)).sum() / (rows.ids.size)
    assert hidden == pytest.approx(0.5, abs=0.01)


def test_denoisers_are_chosen_by_their_rates_and_say_their_mode():
    objective = build(
        denoisers=(("R", 0.15, 3.0), ("S", 0.25, 0.0), ("X", 0.5, 8.0)),
        rates=(2.0, 1.0, 1.0),
        mode_ids=(R, S, X),
    )
    _, batch = row_parts(objective, 2000)
    mode = batch.targets[:, 0]
    counts = np.array([(mode == i).sum() for i in (R, S, X)])
    assert counts.sum() == 2000
    deviation = np.sqrt(2000 * 0.25)  # the largest of the three binomials
    assert (np.abs(counts - [1000, 500, 500]) < 4 * deviation).all()
    assert not batch.weights[:, 0].any()
    density = (batch.weights > 0).mean(1)
    assert density[mode == X].min() > density[mode == R].max()


def test_every_segment_begins_with_the_mode_and_gives_back_a_part_of_its_row():
    objective = build(mode_ids=(R, S, X))
    rows, batch = row_parts(objective, 60, length=90)
    starts = np.zeros(60, int)
    for r in range(60):
        got, modes = [], set()
        for source, target in parts(batch, r).values():
            modes.add(source[0])
            text = (
                rebuilt([t for t in source if t not in (R, S, X)], target)
                if target
                else source[1:-1]
            )
            got += [*text, EOS]
        assert len(modes) == 1 and modes <= {R, S, X}
        text = rows.ids[r][rows.segments[r] > 0].tolist()
        starts[r] = place_in(got, text)
    assert len(np.unique(starts)) > 20  # windows begin anywhere
    assert starts.min() == 0


def place_in(part, text):
    """Offsets in a text of the tokens of `part`, of which the last, an eos, may be added."""
    found = [
        i
        for size in (len(part), len(part) - 1)
        for i in range(len(text) - size + 1)
        if text[i : i + size] == part[:size]
    ]
    assert found, (part, text)
    return found[0]


def test_a_denoiser_has_as_much_text_as_fills_its_row():
    """Whatever it makes of it: 0.5 in spans of 3 makes 4 tokens of 3, one long span few more."""
    for denoiser in ul2.Config.denoisers:
        alone = build(denoisers=(denoiser,))
        _, batch = row_parts(alone, 20)
        assert 0.98 < (batch.inputs.segments > 0).mean() <= 1, denoiser
    lengths = [build(denoisers=(d,)).layout.length for d in ul2.Config.denoisers]
    assert build().layout.length == max(lengths) and min(lengths) < 0.8 * max(lengths)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"denoisers": (("Y", 0.1, 3.0),)}, "R, S, X"),
        ({"rates": (1.0,)}, r"rates \(1\) must be 7"),
        ({"mode_ids": (1, 2)}, r"mode_ids \(2\) must be 3"),
    ],
)
def test_what_cannot_work_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        build(**config)


def test_an_encoder_alone_is_refused():
    with pytest.raises(ValueError, match="needs a decoder"):
        build(ModelInterface(64, is_causal=False, vocab_size=400))
