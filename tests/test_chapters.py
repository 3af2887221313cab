"""Finding chapters, reading and checking their parameters, presets, the README."""
import json

import pytest
from hypothesis import given, strategies as st

from conftest import make_chapter
from kdbook.book.chapters import (MANAGED, PARTS, Chapter, book_root, chapters, check_values, convert, notebooks, read_parameters, read_values, readme,
                                  resolve, runs_folder, select)


def test_reading_a_notebook(book):
    demo, = chapters()
    assert (demo.id, demo.part, demo.title, demo.promise) == ("llm/demo", "llm", "Demo", "You can do it.")
    assert demo.parameters["steps"].comment == "how many" and demo.parameters["rate"].type == "float"
    assert demo.presets() == ["tiny"] and runs_folder() == book / "runs"


@pytest.mark.parametrize("line, message", [("steps = 5", "name: type = value"), ("steps: int", "name: type = value"), ("steps: dict = {}", "must be one of"),
                                           ("steps: int = 0.5", "steps must be int"), ("print(3)", "name: type = value")])
def test_a_parameters_cell_is_flat_and_typed(line, message):
    with pytest.raises(ValueError, match=message):
        read_parameters(line)


@given(st.integers(), st.floats(allow_nan=False), st.booleans(), st.lists(st.integers(), max_size=5))
def test_text_and_value_convert_alike(i, f, b, many):
    assert convert("x", i, "int") == convert("x", str(i), "int") == i
    assert convert("x", f, "float") == convert("x", repr(f), "float") == f
    assert convert("x", b, "bool") is convert("x", str(b).lower(), "bool") is b
    assert convert("x", many, "list[int]") == convert("x", str(many), "list[int]") == many


@pytest.mark.parametrize("value, kind", [("1.5", "int"), (1.0, "int"), (True, "int"), ("", "int"), ("nope", "float"), (None, "float"), (True, "float"), (1, "str"),
                                         (1, "bool"), ("1", "bool"), (3, "list[int]"), ("1,x", "list[int]"), (["a"], "list[float]"), ([1], "list[str]")])
def test_what_does_not_fit_names_parameter_value_and_type(value, kind):
    with pytest.raises(ValueError) as error:
        convert("knob", value, kind)
    assert "knob" in str(error.value) and kind in str(error.value) and repr(value) in str(error.value)


def test_resolving_layers_and_order(book):
    demo = chapters()[0]
    preset = book / "presets" / "real" / "llm" / "demo.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text("steps: 7\nrate: 1e-3\n")
    assert demo.presets() == ["tiny", "real"]
    assert resolve(demo)["steps"] == 5 and resolve(demo, "real")["rate"] == 0.001
    assert resolve(demo, "real", {"steps": "9"})["steps"] == 9
    assert not set(MANAGED) & set(resolve(demo))
    preset.write_text("stepz: 7\n")
    with pytest.raises(ValueError, match=r"no parameter 'stepz' in .*demo.yaml; did you mean steps\?"):
        resolve(demo, "real")


def test_wrong_values_list_the_valid_ones(book):
    demo = chapters()[0]
    with pytest.raises(ValueError) as error:
        check_values(demo, {"stesp": 1})
    assert "did you mean steps" in str(error.value) and "rate: float = 0.5" in str(error.value) and "out_dir" not in str(error.value)
    with pytest.raises(ValueError, match="steps must be int, got 'few'"):
        check_values(demo, {"steps": "few"})
    with pytest.raises(ValueError, match="set by the run"):
        check_values(demo, {"out_dir": "x"})
    with pytest.raises(ValueError, match="no preset 'reel'; it has tiny"):
        resolve(demo, "reel")


@pytest.mark.parametrize("text, message", [("a: {b: 1}", "flat"), ("a: [[1]]", "flat"), ("- 1\n- 2", "lines `name: value`"), ("a: [1", "no valid YAML"), ("1: 2", "lines `name: value`")])
def test_yaml_files_must_be_flat(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_values(tmp_path / "x.yaml")
    with pytest.raises(ValueError, match="cannot read"):
        read_values(tmp_path / "absent.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_values(tmp_path / "empty.yaml") == {}


def test_names_select_chapters_parts_and_slugs(book):
    make_chapter(book, "llm/other")
    make_chapter(book, "multimodal/third")
    ids = lambda *names: [c.id for c in select(names)]
    assert ids("demo") == ids("llm/demo") == ids("nbs/llm/demo.ipynb") == ["llm/demo"]
    assert ids("llm", "third", "demo") == ["llm/demo", "llm/other", "multimodal/third"]
    with pytest.raises(ValueError, match="did you mean llm/demo"):
        select(["llm/dmeo"])
    with pytest.raises(ValueError, match="no chapters yet"):
        select(["datadistill"])
    with pytest.raises(ValueError, match="kdbook list"):
        select(["zzzzzz"])


def test_where_the_book_lies(tmp_path, monkeypatch, root):
    monkeypatch.setenv("KDBOOK_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="KDBOOK_ROOT must name"):
        book_root()
    monkeypatch.delenv("KDBOOK_ROOT")
    monkeypatch.chdir(root / "tests")
    assert book_root() == root
    monkeypatch.setenv("KDBOOK_RUNS", str(tmp_path / "r"))
    assert runs_folder() == tmp_path / "r"


def test_broken_notebook_is_named(book):
    path = book / "nbs" / "llm" / "broken.ipynb"
    path.write_text("{ not json")
    with pytest.raises(ValueError, match="broken.ipynb is no notebook"):
        Chapter("llm/broken", path, book).parameters


def test_readme_is_made_from_the_index(root, book):
    (book / "nbs" / "index.ipynb").write_text(json.dumps({"cells": [{"cell_type": "raw", "source": "---\ntitle: x\n---"}, {"cell_type": "markdown", "source": "# Hi"},
                                                                    {"cell_type": "code", "source": "#| eval: false\nx = 1"}]}))
    assert readme(book) == "# Hi\n\n```python\nx = 1\n```\n"
    if not (root / "nbs" / "index.ipynb").is_file():
        pytest.skip("no index notebook")
    assert (root / "README.md").read_text(encoding="utf-8") == readme(root), "README.md differs from nbs/index.ipynb; run `make export`"


def test_every_chapter_of_this_book_can_be_read_and_its_presets_fit(root, monkeypatch):
    monkeypatch.delenv("KDBOOK_ROOT", raising=False)
    for item in notebooks(root):
        assert item.title and item.promise, item.id
        assert {"seed", "device", "out_dir"} <= set(item.parameters), item.id
        assert item.parameters["device"].default == "cpu" and item.parameters["out_dir"].default == "", item.id
        assert all(parameter.comment for parameter in item.parameters.values()), item.id
        for preset in item.presets():
            resolve(item, preset)
        if item.part in PARTS:
            assert item.presets()[:3] == ["tiny", "real", "paper"], item.id
            first = next("".join(cell["source"]) for cell in item.notebook["cells"] if cell["cell_type"] == "code")
            assert "google.colab" in first and f"blob/main/nbs/{item.id}.ipynb" in item.opening, f"{item.id} cannot be opened in Colab"
    import yaml
    for path in (root / "presets").rglob("*.yaml"):
        id = "/".join(path.with_suffix("").parts[-2:])
        demo = next(item for item in notebooks(root) if item.id == id)
        for name, value in (yaml.safe_load(path.read_text()) or {}).items():
            assert value == resolve(demo, path.parts[-3])[name] and not (isinstance(value, str) and demo.parameters[name].type != "str"), (path, name)
