"""Tables of runs: what is read, what is left out, and what is refused with its rows and numbers."""

import json
import math
import re

import numpy as np
import pytest

from lm.scaling import table

HEADER = ("run", "parameters", "non_embedding_parameters", "tokens", "flops", "loss")


def records(num=4):
    sizes, counts = [1e6 * 2**i for i in range(num)], [1e8 * 2**i for i in range(num)]
    runs = [(n, d) for n in sizes for d in counts]
    rows = [(f"r{i}", n, n / 2, d, 6 * n * d, 2 + 1e3 / n) for i, (n, d) in enumerate(runs)]
    return [dict(zip(HEADER, row, strict=True)) for row in rows]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    lines = [",".join(rows[0]), *(",".join(str(v) for v in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def read(tmp_path):
    """(rows, **options) -> (Table, Source) of a CSV file with these rows."""

    def make(rows, *, suffix=".csv", counting="total", **options):
        path = write(tmp_path / f"runs{suffix}", rows)
        return table.read(path, counting=counting, **options)

    return make


def test_csv_jsonl_and_parquet_give_one_table(read):
    tables = [read(records(), suffix=s)[0] for s in (".csv", ".jsonl", ".parquet")]
    for other in tables[1:]:
        for name in ("parameters", "tokens", "flops", "loss", "rows"):
            np.testing.assert_array_equal(getattr(other, name), getattr(tables[0], name))


def test_the_hash_is_that_of_the_file(read, tmp_path):
    import hashlib

    source = read(records())[1]
    assert source.sha256 == hashlib.sha256((tmp_path / "runs.csv").read_bytes()).hexdigest()
    assert source.num_rows == 16


def test_parameters_are_counted_as_stated(read):
    total, rest = (read(records(), counting=c)[0] for c in ("total", "non_embedding"))
    np.testing.assert_array_equal(rest.parameters, total.parameters / 2)
    assert (total.counting, rest.counting) == ("total", "non_embedding")


def test_other_names_of_columns_can_be_given(read):
    rows = [{("n" if k == "parameters" else k): v for k, v in r.items()} for r in records()]
    with pytest.raises(ValueError, match=r"no column parameters; it has run, n, .*--columns"):
        read(rows)
    assert len(read(rows, columns={"parameters": "n"})[0]) == 16
    with pytest.raises(ValueError, match="no column is called"):
        read(rows, columns={"params": "n"})


def test_rows_that_are_not_finished_are_left_out_and_counted(read):
    rows = [{**r, "status": "finished"} for r in records()]
    rows[2] |= {"status": "diverged", "loss": "nan"}
    rows[3] |= {"status": "failed", "loss": ""}
    made, source = read(rows)
    assert len(made) == 14 and source.unfinished == 2 and 3 not in made.rows


def test_a_loss_that_is_not_finite_is_refused_or_dropped_on_request(read):
    rows = records()
    rows[2]["loss"], rows[6]["loss"] = "nan", "inf"
    with pytest.raises(ValueError, match=r"rows 3, 7 \(2 of 16\) is nan, inf.*--drop-non-finite"):
        read(rows)
    made, source = read(rows, drop_non_finite=True)
    assert len(made) == 14 and source.non_finite == 2


REFUSED = {
    "no number": ({"tokens": "1e8 tokens"}, "row 1: tokens is '1e8 tokens', which is no number"),
    "empty": ({"loss": ""}, "row 1: loss is '', which is no number"),
    "zero": ({"tokens": 0}, "tokens of row 1 is 0, and must be finite and above 0"),
    "negative": ({"loss": -1}, "loss of row 1 is -1, and must be finite and above 0"),
    "flops in GFLOPs": (
        {"flops": 6e5},
        "row 1 has 6e+05 against 6 x 1e+06 x 1e+08 = 6e+14, a factor of 1e-09",
    ),
}


@pytest.mark.parametrize("change, words", REFUSED.values(), ids=REFUSED)
def test_a_value_that_cannot_be_is_refused(read, change, words):
    rows = records()
    rows[0] |= change
    with pytest.raises(ValueError, match=re.escape(words)):
        read(rows)


def test_a_whole_table_in_other_units_is_refused(read):
    rows = [{**r, "tokens": r["tokens"] / 1e9} for r in records()]
    with pytest.raises(ValueError, match=r"flops of every row is more than 30 times off"):
        read(rows)


def test_bits_are_found_by_the_size_of_the_vocabulary(read):
    rows = [{**r, "loss": math.log(256) / math.log(2) * 0.9} for r in records()]
    with pytest.raises(ValueError, match=r"guessing among 256 tokens costs 5\.545 nats.*bits"):
        read(rows, vocab_size=256)
    assert len(read(rows)[0]) == 16  # nobody can know without


def test_rows_that_are_there_twice_are_refused_and_seeds_are_not(read):
    rows = records()
    with pytest.raises(ValueError, match=r"1 of 17 rows are there twice \(rows 3 = 17\)"):
        read([*rows, {**rows[2], "run": "again"}])
    seeds = [{**r, "seed": s, "loss": r["loss"] + s / 100} for r in rows for s in (0, 1)]
    assert len(read(seeds)[0]) == 32


def test_settings_are_read_where_they_are_given(read):
    rows = [{**r, "learning_rate": 1e-3, "batch_size": ""} for r in records()]
    made, _ = read(rows)
    assert made.batch_size is None and set(made.learning_rate) == {1e-3}


def test_more_epochs_than_anybody_trains_are_a_mistake_in_units(read):
    rows = [{**r, "unique_tokens": r["tokens"] / 1e6} for r in records()]
    with pytest.raises(ValueError, match="more than 1000 epochs"):
        read(rows)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "runs.txt").write_text("a")
    with pytest.raises(ValueError, match=r"not \.txt"):
        table.read(str(tmp_path / "runs.txt"), counting="total")
