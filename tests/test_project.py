"""The repository itself: exported code in step with the notebooks, clean notebooks, pinned dependencies, contracts and golden numbers."""
import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of what nbdev works on, so that the check changes nothing here."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "kdbook"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def tree(folder: Path, *suffixes: str) -> dict:
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*")) if path.suffix in suffixes and "__pycache__" not in path.parts}


def nbdev(command: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", f"from nbdev.{'export' if 'export' in command else 'clean'} import *; from nbdev.doclinks import *; {command}()"],
                          cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_exporting_changes_nothing(copy):
    before = tree(copy / "kdbook", ".py")
    nbdev("nbdev_export", copy)
    after = tree(copy / "kdbook", ".py")
    assert sorted(after) == sorted(before)
    assert [name for name in after if after[name] != before[name]] == [], "edit the notebooks and run `make export`"


def test_cleaning_changes_nothing(copy):
    before = tree(copy / "nbs", ".ipynb")
    nbdev("nbdev_clean", copy)
    after = tree(copy / "nbs", ".ipynb")
    assert [name for name in after if after[name] != before[name]] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_source_notebooks_are_valid_and_carry_no_outputs(path):
    import nbformat
    notebook = json.loads(path.read_text(encoding="utf-8"))
    nbformat.validate(notebook)
    assert not [cell for cell in notebook["cells"] if cell.get("outputs") or cell.get("execution_count")], "clear the outputs: make clean-notebooks"
    if path.parent.name != "nbs":
        assert sum("parameters" in cell["metadata"].get("tags", []) for cell in notebook["cells"]) == 1
        names = re.findall(r'save_figure\([^,]+, "([^"]+)"', "\n".join("".join(cell["source"]) for cell in notebook["cells"]))
        assert len(names) == len(set(names)), "two figures of one name"


def test_every_module_has_one_notebook_and_every_public_name_a_docstring():
    modules = {str(path.relative_to(ROOT / "kdbook").with_suffix("")) for path in (ROOT / "kdbook").rglob("*.py")} - {"_modidx"}
    exported, bare = set(), []
    for path in NOTEBOOKS:
        found = re.search(r"#\| ?default_exp ([\w.]+)", "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]))
        if found:
            name = found[1].replace(".", "/")
            assert name not in exported, f"two notebooks export to {name}"
            exported.add(name)
            folder = path.parent.name
            assert name == (path.stem if folder == "foundations" else f"{folder}/{path.stem}")
    assert {name for name in modules if not name.endswith("__init__")} == exported
    for path in (ROOT / "kdbook").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(f"{path.stem}.{node.name}")
    assert not bare


def test_dependencies_are_declared_and_pinned():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    declared = {re.split(r"[<>=]", item)[0].lower().replace("_", "-") for item in (parser["DEFAULT"]["requirements"] + " " + parser["DEFAULT"]["dev_requirements"]).split()}
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert declared <= pinned, declared - pinned
    modules = {"sklearn": "scikit-learn", "yaml": "pyyaml", "IPython": "ipython", "PIL": "pillow", "jupyter_client": "jupyter-client", "cycler": "matplotlib"}
    used = set()
    for path in (ROOT / "kdbook").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                used.add(node.module.split(".")[0])
    names = {modules.get(name, name).lower().replace("_", "-") for name in used - set(sys.stdlib_module_names) - {"kdbook"}}
    assert names <= declared | {"ipython"}, names - declared


def test_the_golden_numbers_of_everything_here(shared):
    """All golden files whose module exists; a chapter that is not written yet is not counted."""
    import importlib.util
    spec = importlib.util.spec_from_file_location("check_golden", shared / "tools" / "check_golden.py")
    checker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checker)
    checked, failing = 0, {}
    for path in sorted((shared / "golden").rglob("*.json")):
        for case in json.loads(path.read_text())["cases"]:
            if (ROOT / Path(*case["call"].split(".")[:-1])).with_suffix(".py").is_file():
                checked += 1
                if difference := checker.check(case):
                    failing[f"{path.stem} · {case['name']}"] = difference
    assert checked >= 18 and not failing, failing


def test_signatures_are_those_of_the_contract(shared):
    """Every function and class that a paper's card declares exists with the declared parameter names and defaults."""
    import importlib
    import inspect
    compared = 0
    for path in sorted((shared / "papers").rglob("*.md")):
        part, slug = path.parent.name, path.stem
        if not (ROOT / "kdbook" / part / f"{slug}.py").is_file():
            continue
        module = importlib.import_module(f"kdbook.{part}.{slug}")
        text = path.read_text(encoding="utf-8")
        section = text[text.index("## Public API"):]
        block = re.search(r"```python\n(.*?)```", section, re.S)[1]
        for node in ast.parse(block).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                ours = getattr(module, node.name)
                wanted = [node] if isinstance(node, ast.FunctionDef) else [n for n in node.body if isinstance(n, ast.FunctionDef)]
                for function in wanted:
                    target = ours if isinstance(node, ast.FunctionDef) else getattr(ours, function.name)
                    signature = inspect.signature(target)
                    names = [a.arg for a in function.args.posonlyargs + function.args.args + function.args.kwonlyargs]
                    ordered = [p.name for p in signature.parameters.values()]
                    assert [n for n in ordered if n in names] == names, f"{part}/{slug}.{node.name}.{function.name}: {ordered} for {names}"
                    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults):
                        assert signature.parameters[argument.arg].kind is inspect.Parameter.KEYWORD_ONLY
                    extra = [p for p in signature.parameters.values() if p.name not in names and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
                    assert all(p.default is not p.empty for p in extra), f"{node.name}: {extra}"
                    compared += 1
    assert compared


def test_nothing_names_a_machine_or_a_registry_host():
    wrong = re.compile(r"/work/|/root/|files\.pythonhosted|pypi\.org/simple|download\.pytorch\.org")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    hits = [name for name in tracked if name != "tests/test_project.py" and (ROOT / name).is_file() and wrong.search((ROOT / name).read_text(encoding="utf-8", errors="ignore"))]
    assert not hits
