"""The wheel: what is in it, and that an installed copy without the dev extra works from any folder."""
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built in a copy of the tracked and new files, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder / "dist"), str(folder / "source")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((folder / "dist").glob("*.whl"))


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "kdbook/_book/nbs/llm/taid.ipynb" in names and "kdbook/_book/presets/real/llm/taid.yaml" in names and "kdbook/llm/taid.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    allowed = (".py", ".ipynb", ".yaml", ".json")
    assert not [name for name in names if ".dist-info/" not in name and not name.endswith(allowed)]
    archive = zipfile.ZipFile(wheel)
    assert not [name for name in names if name.endswith(".ipynb") and b'"output_type"' in archive.read(name)]
    assert wheel.stat().st_size < 5_000_000


def test_installed_without_the_dev_extra(wheel, tmp_path):
    """A fresh environment: kdbook's own dependencies come from this one's constraints."""
    folder = tmp_path / "env"
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt"), str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("KDBOOK", "PYTHON"))}

    def kdbook(*words):
        return subprocess.run([str(python.parent / "kdbook"), *words], cwd=elsewhere, env=env, capture_output=True, text=True)

    for words in (["--help"], ["list"], ["doctor"]):
        done = kdbook(*words)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "llm/taid" in kdbook("list").stdout
    done = kdbook("run", "llm/taid", "-p", "steps=40", "-p", "sharpness=1.0")
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "runs/tiny/llm/taid").is_dir() and list(elsewhere.rglob("*.png"))
    assert kdbook("new", "llm/x").returncode == 2
    done = subprocess.run([str(python), "-c", "from kdbook.llm.taid import TAIDScheduler, taid_loss; import torch; print(taid_loss(torch.zeros(2, 3), torch.ones(2, 3), 0.5).item())"],
                          cwd=elsewhere, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and abs(float(done.stdout) - 1.0986) < 1e-3
