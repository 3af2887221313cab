"""record, claim, the verdict's statistics, and the ledger."""
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, strategies as st

from kdbook.book import claims
from kdbook.book.claims import MIME, Row, chapter_rows, interval, ledger, merge, read_records, to_csv, to_markdown, verdict


def notebook(*entries, **meta):
    outputs = [{"output_type": "display_data", "metadata": {}, "data": {MIME: entry, "text/plain": ""}} for entry in entries]
    return {"cells": [{"cell_type": "markdown", "source": ""}, {"cell_type": "code", "outputs": outputs}], "metadata": {"kdbook": meta}}


def claimed(name, margin):
    return {"kind": "claim", "id": name, "sentence": f"{name} holds", "margin": margin, "unit": "nats"}


def write(folder, seed, *entries, chapter="llm/x", preset="tiny", **meta):
    path = folder / preset / chapter / f"seed{seed}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook(*entries, **meta)))


def test_printed_outside_of_a_notebook(capsys):
    claims.record("x", np.float64(2.5))
    claims.claim("a", "a is true", -1, "nats")
    out = capsys.readouterr().out
    assert "x = 2.5" in out and "does not hold" in out and "a is true" in out


def test_values_of_tensors_and_arrays_are_taken():
    import torch
    claims.record("t", torch.tensor([1.0]))
    claims.records({"a": np.array(2), "b": 3})
    for bad in (torch.tensor([1.0, 2.0]), "many", None):
        with pytest.raises(ValueError, match="must be one number"):
            claims.record("x", bad)
    with pytest.raises(ValueError, match="must not be empty"):
        claims.claim("", "s", 1)
    with pytest.raises(ValueError, match="name"):
        claims.record("", 1)
    with pytest.raises(ValueError, match="not empty"):
        claims.records({})


def test_the_papers_own_number_stands_beside_the_claim(tmp_path, capsys):
    claims.claim("a", "a is true", 1, "nats", paper="86.0 against 84.5, Table 2")
    assert "[paper: 86.0 against 84.5, Table 2]" in capsys.readouterr().out
    with pytest.raises(ValueError, match="paper must be a text, got 86.0"):
        claims.claim("a", "a is true", 1, "nats", paper=86.0)
    write(tmp_path, 0, {**claimed("with", 1.0), "paper": "86.0"}, claimed("without", 1.0))
    assert {row.claim: row.paper for row in ledger(tmp_path, "tiny", ["llm/x"])} == {"with": "86.0", "without": ""}


def test_a_kernel_publishes_the_machine_readable_part(tmp_path):
    code = ("from IPython.testing.globalipapp import start_ipython; ip = start_ipython()\n"
            "from IPython.utils.capture import capture_output\n"
            "from kdbook.book.claims import claim, record\n"
            "with capture_output() as out: claim('a', 's', 0.5, 'nats'); record('n', float('nan'))\n"
            "import json; print(json.dumps([o.data for o in out.outputs]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "IPYTHONDIR": str(tmp_path)})
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first[MIME] == {"kind": "claim", "id": "a", "sentence": "s", "margin": 0.5, "unit": "nats", "paper": ""}
    assert second[MIME]["value"] == "nan" and "n = nan" in second["text/plain"]


def test_reading_back():
    found = read_records(notebook({"kind": "record", "name": "n", "value": "inf"}, {"kind": "records", "values": {"a": 1, "b": 2.5}}, claimed("c", 0.5)))
    assert found["records"] == {"n": math.inf, "a": 1.0, "b": 2.5}
    assert found["claims"] == [{"id": "c", "sentence": "c holds", "margin": 0.5, "unit": "nats", "paper": "", "cell": 1}]
    with pytest.raises(ValueError, match="made twice"):
        read_records(notebook(claimed("c", 1), claimed("c", 2)))
    with pytest.raises(ValueError, match="made twice"):
        read_records(notebook({"kind": "record", "name": "a", "value": 1}, {"kind": "records", "values": {"a": 1}}))


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12))
def test_interval_agrees_with_scipy(values):
    from scipy import stats
    mean, low, high = interval(values)
    spread = np.std(values, ddof=1)
    assert math.isclose(mean, np.mean(values), rel_tol=1e-9, abs_tol=1e-6)
    if spread > 1e-9 * max(1, abs(mean)):
        expected = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=stats.sem(values))
        assert np.allclose((low, high), expected, rtol=1e-6, atol=1e-6)


def test_verdicts():
    assert verdict([0.4, 0.5, 0.6]) == "reproduced"
    assert verdict([-0.4, -0.5, -0.6]) == "contradicted"
    assert verdict([-1, 1, 2]) == "inconclusive"
    assert verdict([0.0, 0.0, 0.0]) == "inconclusive"
    assert verdict([0.3, 0.3, 0.3]) == "reproduced"
    assert verdict([2.0]) == "one seed"
    assert verdict([math.nan, 1.0, 2.0]) == "inconclusive"
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_ledger_reads_all_seeds_and_leaves_out_failed_old_and_changed_runs(tmp_path):
    for seed, margin in enumerate((0.9, 1.0, 1.1)):
        write(tmp_path, seed, claimed("big", margin), source="new", started=f"2026-01-0{seed + 1}", git={"commit": "abcdef1234567", "dirty": False},
              versions={"torch": "2", "numpy": "1"})
    write(tmp_path, 3, claimed("big", -50.0), source="old", started="2025-12-01")
    (tmp_path / "tiny/llm/x/seed4.failed.ipynb").write_text("{}")
    write(tmp_path, 0, claimed("big", -50.0), chapter="llm/x/steps=5")
    row, = ledger(tmp_path, "tiny", ["llm/x", "llm/absent"])
    assert (row.seeds, row.verdict, row.margins, row.commit, row.versions) == (3, "reproduced", (0.9, 1.0, 1.1), "abcdef1234", "torch 2")
    assert math.isclose(row.mean, 1.0) and chapter_rows(tmp_path, "real", "llm/x") == []


def test_forms_and_merging(tmp_path):
    def row(chapter, preset, mean):
        return Row(chapter, preset, "c", "a | b holds, \"really\"", "nats", mean, mean - 1, mean + 1, 3, "reproduced", (mean,), "torch 2", "abc", 4, "1.0, Table 2")

    path = tmp_path / "results" / "ledger.csv"
    assert merge(path, [row("llm/b", "tiny", 2.0), row("llm/a", "tiny", 1.0)]) == 2
    assert merge(path, [row("llm/a", "tiny", 5.0), row("llm/a", "real", 6.0)]) == 3
    import csv
    kept = list(csv.DictReader(open(path, newline="")))
    assert [(r["chapter"], r["preset"], r["mean"]) for r in kept] == [("llm/a", "real", "6"), ("llm/a", "tiny", "5"), ("llm/b", "tiny", "2")]
    assert kept[0]["sentence"] == "a | b holds, \"really\"" and kept[0]["paper"] == "1.0, Table 2"
    one_seed = Row("llm/c", "tiny", "c", "s", "", 1.0, math.nan, math.nan, 1, "one seed", (1.0,), "", "", 0)
    assert "[" not in to_markdown([one_seed]).splitlines()[-1] and ",,," in to_csv([one_seed])
    path.write_text("chapter,preset\nx,y\n")
    with pytest.raises(ValueError, match="lacks the columns"):
        merge(path, [one_seed])
    assert path.read_text() == "chapter,preset\nx,y\n"
