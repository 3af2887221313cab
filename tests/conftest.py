"""What the tests share: the project's folder, the folder with golden numbers and real data, and a cleaned environment."""
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("KDBOOK_SHARED", ROOT.parent / "shared"))


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
