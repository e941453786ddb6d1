"""The ledger: what each step consumed, compared when it is done again."""

import json

import numpy as np
import pytest

from lm.reliability.data_ledger import LEDGER_FILE, Ledger, LedgerMismatch, read, start_totals


def info(step, *, content=0):
    words = np.random.default_rng([step, content]).integers(0, 2**32, (2, 2), np.uint32)
    return {"records": words[0], "content": words[1], "filled": 90 + step, "scored": 80}


def run(folder, totals, steps, **options):
    ledger = Ledger(str(folder), totals, **options)
    for step in steps:
        ledger.record(step, info(step), 100)
    ledger.close()
    return ledger.totals()


def test_counts_are_sums_of_what_was_there(tmp_path):
    totals = run(tmp_path, start_totals(), range(5))
    assert totals["steps"] == 5
    assert totals["filled"] == 90 + 91 + 92 + 93 + 94
    assert totals["padding"] == 500 - totals["filled"]
    assert totals["scored"] == 400
    assert [entry["step"] for entry in read(str(tmp_path))] == list(range(5))


def test_a_run_with_kills_and_rewinds_has_the_ledger_of_one_without(tmp_path):
    whole = run(tmp_path / "whole", start_totals(), range(10))
    at_4 = run(tmp_path / "killed", start_totals(), range(4))
    run(tmp_path / "killed", at_4, range(4, 9))
    path = tmp_path / "killed" / LEDGER_FILE
    path.write_text(path.read_text()[:-20])  # a kill cut the last line
    ledger = Ledger(str(tmp_path / "killed"), at_4)  # of the checkpoint at step 4
    for step in range(4, 7):
        ledger.record(step, info(step), 100)
    ledger.roll_back(at_4)
    for step in range(4, 10):
        ledger.record(step, info(step), 100)
    ledger.close()
    assert ledger.totals() == whole
    assert read(str(tmp_path / "killed")) == read(str(tmp_path / "whole"))


def test_a_step_done_again_with_other_data_is_refused_and_named(tmp_path):
    at_2 = run(tmp_path, start_totals(), range(2))
    run(tmp_path, at_2, range(2, 6))
    ledger = Ledger(str(tmp_path), at_2)
    ledger.record(2, info(2), 100)
    with pytest.raises(LedgerMismatch, match=r"step 3 consumed .*content: .* -> .*changed"):
        ledger.record(3, info(3, content=1), 100)
    ledger.roll_back(at_2)
    with pytest.raises(LedgerMismatch, match="step 2"):  # of this process itself
        ledger.record(2, info(2, content=1), 100)


def test_data_changed_on_purpose_starts_the_rest_afresh(tmp_path):
    at_2 = run(tmp_path, start_totals(), range(2))
    run(tmp_path, at_2, range(2, 6))
    ledger = Ledger(str(tmp_path), at_2, compare=False)
    ledger.record(2, info(2, content=1), 100)
    assert [entry["step"] for entry in read(str(tmp_path))] == [0, 1, 2]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    other = run(tmp_path / "a", start_totals(), range(2))
    run(tmp_path / "b", start_totals(), range(1))
    Ledger(str(tmp_path / "b"), other | {"steps": 3})  # nothing is known of step 2
    with pytest.raises(LedgerMismatch, match="not of the same run"):
        Ledger(str(tmp_path / "b"), other | {"steps": 1})


def test_only_the_active_process_writes_and_all_compare(tmp_path):
    totals = run(tmp_path, start_totals(), range(3))
    before = (tmp_path / LEDGER_FILE).read_text()
    assert run(tmp_path, start_totals(), range(3), active=False) == totals
    ledger = Ledger(str(tmp_path), start_totals(), active=False)
    with pytest.raises(LedgerMismatch):
        ledger.record(0, info(0, content=1), 100)
    assert (tmp_path / LEDGER_FILE).read_text() == before


def test_lines_are_json_with_hexadecimal_hashes(tmp_path):
    run(tmp_path, start_totals(), range(1))
    entry = json.loads((tmp_path / LEDGER_FILE).read_text())
    for name in ("records", "content", "chain"):
        assert len(entry[name]) == 16 and int(entry[name], 16) > 0
