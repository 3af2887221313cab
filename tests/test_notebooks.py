"""Every notebook of the book, executed at tiny with one seed: no error, no stray warning, figures with alt text."""
import json
import os

import pytest

from conftest import ROOT
from kdbook.book.chapters import PARTS, Chapter, notebooks
from kdbook.book.runs import run


@pytest.mark.parametrize("notebook", notebooks(ROOT), ids=lambda n: n.id)
def test_executes(notebook: Chapter, tmp_path, monkeypatch):
    data = ROOT.parent / "shared" / "data"
    if "KDBOOK_DATA" not in os.environ and data.is_dir():
        monkeypatch.setenv("KDBOOK_DATA", str(data))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run(notebook, seed=0, runs=tmp_path)
    executed = json.loads(result.path.read_text(encoding="utf-8"))
    loud = [output["text"] for cell in executed["cells"] for output in cell.get("outputs", []) if output.get("name") == "stderr"]
    assert not loud, "".join(loud[0])
    for cell in executed["cells"]:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert output.get("metadata", {}).get("image/png", {}).get("alt"), "a figure that did not go through save_figure"
    if notebook.part in PARTS:
        assert result.claims and result.figures and result.records
