"""What the tests share: the project's folder, the folder with golden numbers and real data, and a cleaned environment."""
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import random

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile("book", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("book")

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("KDBOOK_SHARED", ROOT.parent / "shared"))


@pytest.fixture(autouse=True)
def seeds():
    """Every test draws the same numbers in every run and in every order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden numbers, paper cards and real data that lies beside the checkout in CI."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"no folder with golden numbers at {SHARED}")
    return SHARED


@pytest.fixture
def real_data(shared, monkeypatch) -> Path:
    """The folder with real data, with KDBOOK_DATA pointing at it."""
    if not (shared / "data" / "manifest.json").is_file():
        pytest.skip(f"no real data at {shared / 'data'}")
    monkeypatch.setenv("KDBOOK_DATA", str(shared / "data"))
    return shared / "data"


def make_chapter(root: Path, id="llm/demo", parameters="steps: int = 5  # how many\nrate: float = 0.5\nname: str = 'x'\nflag: bool = False\n"
                 "sizes: list[int] = [1, 2]\nseed: int = 0\ndevice: str = 'cpu'\nout_dir: str = ''", code=("print(steps)",)):
    """A small chapter below `root`, with the given parameters cell and code cells."""
    from kdbook.book.chapters import Chapter
    cells = [{"cell_type": "markdown", "id": "m", "metadata": {}, "source": ["# Demo\n", "\n", "> You can\n", "> do it."]},
             {"cell_type": "code", "id": "p", "metadata": {"tags": ["parameters"]}, "execution_count": None, "outputs": [], "source": parameters}]
    cells += [{"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": source} for i, source in enumerate(code)]
    path = root / "nbs" / f"{id}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
                                "nbformat": 4, "nbformat_minor": 5}))
    return Chapter(id, path, root)


@pytest.fixture
def book(tmp_path, monkeypatch) -> Path:
    """A book of one chapter in a temporary folder, which kdbook takes for the book."""
    for name in ("KDBOOK_RUNS",):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KDBOOK_ROOT", str(tmp_path))
    make_chapter(tmp_path)
    return tmp_path


def golden(shared: Path, only: str) -> None:
    """Fail with the list of golden cases of `only` ("part/slug") that do not hold."""
    import importlib.util
    spec = importlib.util.spec_from_file_location("check_golden", shared / "tools" / "check_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases = json.loads((shared / "golden" / f"{only}.json").read_text())["cases"]
    failing = {case["name"]: difference for case in cases if (difference := module.check(case))}
    assert cases and not failing, failing
