"""Pictures show what the arrays hold."""

import html
import io
import json
import re

import numpy as np
import pytest

from lm.data.pipeline import ExplainedRow
from lm.data.rows import Span
from lm.interpret import notebook_views
from lm.interpret.markup import COLORS
from lm.interpret.token_losses import TokenLosses
from lm.tokenizers.tokenizer import ByteTokenizer
from lm.types import Batch

TOKENIZER = ByteTokenizer()
TEXT = "if a < b:\n\treturn '&amp;'"


@pytest.fixture(scope="module")
def batch(pack):
    inputs = pack([(4, 6), (3, 2, 4)], length=10, vocab_size=100)
    targets = np.random.default_rng(0).integers(97, 122, (2, 10)).astype(np.int32)
    return Batch(inputs, targets, (inputs.segments != 0).astype(np.float32))


@pytest.fixture(scope="module")
def explained():
    spans = [Span(i, f"{'abc'[i]}.py", 0, n) for i, n in enumerate((3, 2, 4))]
    return ExplainedRow("store", 0, 0, spans, [""] * 3)


def text_of(page):
    return html.unescape(re.sub(r"<[^>]*>", "", page))


def background(page):
    return re.findall(r'<span style="background: ([^"]*)" title', page)


def test_coloured_text_is_the_text():
    ids = TOKENIZER.encode(TEXT)
    page = notebook_views.losses_html(TOKENIZER, ids, np.zeros(len(ids)), ids)
    assert text_of(page).endswith(TEXT.replace("\n", "↵\n"))


def test_colour_follows_the_loss_up_to_the_limit():
    page = notebook_views.losses_html(
        TOKENIZER, TOKENIZER.encode("abcd"), np.array([0, 2, 4, 9]), limit=4
    )
    colors = [[int(x) for x in re.findall(r"\d+", c)] for c in background(page)]
    assert colors[0] == [255, 255, 255]
    assert colors[2] == colors[3]
    assert all(a >= b >= c for a, b, c in zip(*colors[:3], strict=True))
    assert 'title="b: 2.00 nats"' in page


def test_a_row_is_its_documents_each_in_its_colour(batch, explained):
    page = notebook_views.row_html(TOKENIZER, batch, 1, explained)
    text = TOKENIZER.decode(batch.targets[1])
    parts = re.findall(r'background: (#\w{6})90">([^<]*)<', page)
    assert parts == list(zip(COLORS[:3], (text[:3], text[3:5], text[5:9]), strict=True))
    assert re.findall(r"(\w)\.py", page) == ["a", "b", "c"]


def test_the_hardest_tokens_are_scored_ones_in_order(batch):
    nats = np.zeros((2, 10), np.float32)
    nats[1, 4], nats[0, 2], nats[1, 9] = 3.0, 7.0, 50.0  # the last is padding
    losses = TokenLosses(nats, np.full((2, 10), ord("Z")), np.full((2, 10), 0.25))
    page = notebook_views.hardest_html(TOKENIZER, batch, losses, count=2)
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in page.split("<tr>")[2:]]
    text = [TOKENIZER.decode(row) for row in batch.targets]
    # what comes before is of the same document only
    assert rows == [
        ["7.0", text[0][:2], text[0][2], "Z  (25%)"],
        ["3.0", text[1][3], text[1][4], "Z  (25%)"],
    ]


def test_the_overview_names_what_is_not_the_default(make_experiment):
    experiment = make_experiment({"optimizer.learning_rate": 0.123, "model.num_layers": 3})
    page = text_of(notebook_views.overview(experiment, 4))
    assert "step 4 of 10" in page and "optimizer.learning_rate0.123" in page
    assert "model.num_layers3" in page and "optimizer.weight_decay" not in page


def test_references_are_those_of_the_summary(tmp_path):
    assert notebook_views.references(str(tmp_path)) == {}
    (tmp_path / "summary.json").write_text(json.dumps({"gzip_bits_per_byte": 2.5, "steps": 3}))
    assert notebook_views.references(str(tmp_path)) == {"gzip -9": 2.5}


@pytest.mark.parametrize("window", [None, 2])
def test_the_mask_is_drawn_in_the_colours_of_the_documents(batch, explained, window):
    figure = notebook_views.packing_figure(batch.inputs, 1, explained, (window,))
    image = np.asarray(figure.axes[1].images[0].get_array())  # [T, S, 3]
    segments, places = batch.inputs.segments[1], np.arange(10)
    back = places[:, None] - places
    seen = (segments[:, None] == segments) & (segments > 0) & (back >= 0) & (back < (window or 99))
    assert ((image < 1).any(-1) == seen).all()
    for number in (1, 2, 3):
        colors = {tuple(c) for c in image[seen & (segments == number)]}
        wanted = tuple(int(COLORS[number - 1][i : i + 2], 16) / 255 for i in (1, 3, 5))
        assert len(colors) == 1 and colors.pop() == pytest.approx(wanted)
    assert [t.get_text().split()[0] for t in figure.legends[0].texts] == ["a.py", "b.py", "c.py"]


def test_attention_is_drawn_with_its_tokens_and_heads(tmp_path):
    maps = np.random.default_rng(0).random((2, 3, 4, 4))
    figure = notebook_views.attention_figure(
        maps, ["a", " b", "\n", "long" * 5], [(1, 2), (0, 0), (1, 0)]
    )
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title().split(":")[0] for axis in panels] == [
        "layer 1, head 2",
        "layer 0, head 0",
        "layer 1, head 0",
    ]
    np.testing.assert_array_equal(panels[0].images[0].get_array(), maps[1, 2])
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert names == ["a", "·b", "↵", "longlongl"]
    small = notebook_views.heads_figure(maps)
    assert len(small.axes) == 6
    np.testing.assert_array_equal(small.axes[5].images[0].get_array(), maps[1, 2])
    for drawn in (figure, small):
        drawn.savefig(io.BytesIO(), format="png")


def test_loss_by_context_is_the_mean_of_each_doubling():
    positions = np.arange(9)[None]
    nats = np.array([[8.0, 4.0, 2.0, 3.0, 1.0, 1.0, 1.0, 2.0, 99.0]])
    figure = notebook_views.position_figure(nats, positions, (nats < 99).astype(np.float32))
    axis = figure.axes[0]
    drawn = axis.lines[0].get_ydata().astype(float)
    np.testing.assert_allclose(drawn, [8, 4, 2.5, 1.25])
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0", "1", "2–3", "4–7"]
