"""Pictures of runs say what their records do."""

import json
import math
import types
from collections import Counter

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lm.interpret import lens_plots, notebook_views
from lm.scaling.sweep import report
from lm.telemetry import fonts, loss_curve, metrics
from scripts import pretrain


def write(workdir, losses):
    lines = [
        json.dumps({"step": i + 1, "kind": "train", "loss": loss, "learning_rate": 10.0 ** (i - 9)})
        for i, loss in enumerate(losses)
    ]
    (workdir / metrics.METRICS_FILE).write_text("\n".join(lines) + "\n")


def test_the_range_curve_finds_the_lowest_loss(tmp_path):
    write(tmp_path, [5.0, 4.5, 4.0, 3.0, 2.0, 6.0, 9.0])
    path, rate = loss_curve.range_curve(str(tmp_path), smoothing=0.2)
    assert rate == 1e-5 and path.endswith("lr_range.png")
    _, smoothed = loss_curve.range_curve(str(tmp_path), smoothing=0.9)  # remembers the first ones
    assert smoothed == 1e-5


def test_the_loss_curve_has_a_gap_where_every_update_was_skipped(tmp_path):
    records = [
        {"step": i, "kind": "train", "tokens": 1e6, "loss": 6.0 - i, "seconds": 1.0}
        for i in range(1, 5)
    ]
    records[1] = {"step": 2, "kind": "train", "skipped": 1, "seconds": 1.0}
    for step in (2, 4):
        for store in ("/a/validation", "/b/validation"):
            record = {"step": step, "kind": "eval", "source": store, "tokens": 9.0}
            records.append({**record, "loss": 6.5 - step, "bits_per_byte": 2.5})
    records.append({"step": 4, "kind": "eval", "source": "/c", "tokens": 9.0, "loss": math.nan})
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / metrics.METRICS_FILE).write_text(text)
    figure = loss_curve.loss_figure(str(tmp_path), {"gzip": 2.1})
    training, *stores = figure.axes[0].lines
    np.testing.assert_array_equal(training.get_xdata(), [1, 1, 2, 3])  # millions of tokens
    np.testing.assert_array_equal(training.get_ydata(), [5, np.nan, 3, 2])
    assert [line.get_label() for line in stores] == ["a/validation", "b/validation", "c"]
    assert all(np.isfinite(axis.get_ylim()).all() for axis in figure.axes)
    assert loss_curve.loss_curve(str(tmp_path)).endswith("loss.png")


def test_a_run_of_skipped_updates_alone_has_nothing_to_draw(tmp_path):
    record = {"step": 2, "kind": "train", "skipped": 2, "seconds": 1.0}
    (tmp_path / metrics.METRICS_FILE).write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match="no loss"):
        loss_curve.loss_curve(str(tmp_path))


def test_a_run_without_records_is_refused(tmp_path):
    write(tmp_path, [5.0])
    with pytest.raises(ValueError, match="1 records of training"):
        loss_curve.range_curve(str(tmp_path))


def test_totals_count_windows_of_skipped_updates_and_runs_without_a_timed_step():
    """A window of 60 scored of 100 tokens in 2 seconds, and one of 20 tokens in 1."""
    skipped = {"step": 4, "kind": "train", "skipped": 2, "seconds": 1.0, "tokens_per_second": 20.0}
    one = {"step": 2, "kind": "train", "tokens": 60.0, "seconds": 2.0, "tokens_per_second": 50.0}
    assert pretrain.totals([one, skipped, {"kind": "eval"}]) == {
        "tokens": 60.0,
        "train_seconds": 3.0,
        "tokens_per_second": 40.0,
    }
    untimed = {"step": 1, "kind": "train", "tokens": 60.0, "seconds": 0.0}
    assert pretrain.totals([untimed])["tokens_per_second"] is None


@pytest.fixture
def matplotlib_fonts(monkeypatch):
    """No other fonts are installed than those that come with matplotlib."""
    from matplotlib.font_manager import fontManager

    own = [e for e in fontManager.ttflist if "mpl-data" in e.fname]
    monkeypatch.setattr(fontManager, "ttflist", own)


@pytest.fixture
def han_font(tmp_path, matplotlib_fonts):
    """The family of an installed font that has squares for two Chinese characters."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib.font_manager import fontManager

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square, path, name = pen.glyph(), tmp_path / "han.ttf", "Two Characters"
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "hong", "lou"])
    font.setupCharacterMap({ord("红"): "hong", ord("楼"): "lou"})
    font.setupGlyf(dict.fromkeys((".notdef", "hong", "lou"), square))
    font.setupHorizontalMetrics(dict.fromkeys((".notdef", "hong", "lou"), (800, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": name, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    fontManager.addfont(str(path))
    return name


def test_letters_come_from_an_installed_font_that_has_them(han_font):
    families = fonts.families("run of 红楼")
    assert families == ["sans-serif", han_font]
    assert fonts.readable("红楼梦", families) == "红楼\\u68a6"  # no font has the third
    assert fonts.families("plain text, código, код") == ["sans-serif"]


def test_letters_that_no_font_has_are_escaped_and_dollars_are_no_mathematics(matplotlib_fonts):
    families = fonts.families("红楼 a$b$ \udcff")
    assert families == ["sans-serif"]
    assert fonts.readable("红 a$b$ \udcff\n", families) == r"\u7ea2 a\$b\$ \udcff\n"


def test_a_run_with_chinese_names_is_drawn_without_boxes(tmp_path, han_font, recwarn):
    folder = tmp_path / "红楼$1$"
    folder.mkdir()
    write(folder, [3.0, 2.0])
    with (folder / metrics.METRICS_FILE).open("a") as file:
        record = {"step": 2, "kind": "eval", "source": "/数据/红梦", "tokens": 9.0, "loss": 2.0}
        file.write(json.dumps(record) + "\n")
    loss_curve.loss_curve(str(folder))
    loss_curve.range_curve(str(folder))
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
    [legend] = loss_curve.loss_figure(str(folder)).legends
    assert [text.get_text() for text in legend.get_texts()] == ["training", r"红\u68a6"]


def test_tokens_of_other_scripts_are_drawn_without_boxes(matplotlib_fonts, han_font, recwarn):
    lens = types.SimpleNamespace(confidence=np.full((1, 1, 2), 0.5))
    pairs = [("红", "梦"), ("$x$", "b")]
    for figure in (
        lens_plots.lens_figure(lens, ["红", "$x$"], [["楼", "梦"]]),
        lens_plots.pairs_figure(pairs, np.ones((2, 2))),
        notebook_views.attention_figure(np.full((1, 1, 2, 2), 0.5), ["红", "梦"], [(0, 0)]),
    ):
        FigureCanvasAgg(figure).draw()
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_values_of_a_sweep_are_drawn_without_boxes(matplotlib_fonts, han_font, recwarn, tmp_path):
    ranks = [
        report.Rank({"data.train": f"/数据/{name}"}, [loss], Counter())
        for name, loss in (("红", 2.0), ("$x$", 3.0))
    ]
    report.plot(ranks, tmp_path / "sweep.png")
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
