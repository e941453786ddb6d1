"""The script that writes the table of attention alone in docs/scale.md."""

import importlib.util

import pytest

from scripts import attention_table as script

needs_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"
)


@needs_tpu
def test_attention_is_measured_by_its_products_and_times():
    """Two products forward and four backward, over the whole square of scores."""
    length = 256
    found = script.measure("v5e:2x2", length, "xla", "gather", 1)
    products = 6 * 2 * script.HEADS * length**2 * script.SIZE
    assert found.fits and found.flops == products
    assert 0 < found.lower_bound_s < found.upper_bound_s
    assert found.lower_bound_s >= products / 197e12  # the peak of a v5e


def test_the_table_takes_the_place_of_the_one_before(tmp_path, monkeypatch):
    docs = tmp_path / "scale.md"
    old = "| length | splash |\n|---|---|\n| 1 | 2 |\n"
    docs.write_text(f"before\n\n{script.HEADING}\n\nOld words.\n\n{old}\nbelow\n\n## Next\n")
    monkeypatch.setattr(script, "DOCS", docs)
    script._write("v5e:4x4", ["splash"], ["| 4,096 | 1 | 5 |"])
    text = docs.read_text()
    assert text.startswith(f"before\n\n{script.HEADING}\n") and text.endswith(
        "| length | sequence | splash |\n|---|---|---|\n| 4,096 | 1 | 5 |\n\nbelow\n\n## Next\n"
    )
    assert "Old words" not in text
