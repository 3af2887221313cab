"""Pairs from the standard library: properties that hold for every Python version, and small sources made for the purpose."""
import ast
import gzip
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from kdbook.worlds import stdlib_code as world
from kdbook.worlds.stdlib_code import functions, library_files, split, stdlib_code


@pytest.fixture(scope="module")
def pairs():
    return stdlib_code(cache=False)


@pytest.fixture
def library(tmp_path):
    """A small library with modules, a package, tests, a broken file and an old encoding."""
    def write(name, text, encoding="utf-8"):
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(textwrap.dedent(text).encode(encoding))
    write("alpha.py", '''
        def double(x):
            """Return twice the number.

            Details follow.
            """
            y = 2 * x
            return y

        class Box:
            async def open_lid(self):
                """Lift the lid of the box."""
                text = """no
        margin"""
                return text

            def short(self):
                """Too short."""
                return 1
        ''')
    write("pack/__init__.py", 'def copy_of_double(x):\n    """Also return twice the number."""\n    y = 2 * x\n    return y\n')
    write("pack/deep/beta.py", 'def again(n):\n    """Count down to zero."""\n    if n:\n        return again(n - 1)\n')
    write("latin.py", '# -*- coding: latin-1 -*-\ndef greet():\n    """Say good day in Köln."""\n    return "ö"\n', "latin-1")
    write("broken.py", "def f(:\n")
    write("test/test_alpha.py", 'def test_it():\n    """Test that it really works."""\n    assert True\n')
    write("encodings/x.py", 'def enc():\n    """Encode this very text now."""\n    return 1\n')
    return tmp_path / "lib"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    import pooch
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache" / "kdbook" / "stdlib_code"


def test_properties_of_the_real_library(pairs):
    assert len(pairs) > 2000 and len(set(pairs.module)) > 100 and re.fullmatch(r"\w+ 3\.\d+\.\d+\S*", pairs.python)
    assert len(set(pairs.doc)) == len(set(pairs.code)) == len(pairs)
    for doc, code, name in zip(pairs.doc, pairs.code, pairs.name):
        tree = ast.parse(code)
        assert len(tree.body) == 1 and isinstance(tree.body[0], (ast.FunctionDef, ast.AsyncFunctionDef)) and tree.body[0].name == "f"
        assert 3 <= len(doc.split()) <= 60 and 2 <= len(code.split("\n")) <= 60 and "\n" not in doc
        assert ast.get_docstring(tree.body[0]) != doc and (name == "f" or not re.search(rf"\b{name}\b", code))
    tops = {module.split(".")[0] for module in pairs.module}
    assert not tops & {"test", "idlelib", "encodings", "turtledemo"} and {"json", "asyncio", "pathlib"} & tops
    assert list(pairs.module) == sorted(pairs.module, key=list(dict.fromkeys(pairs.module)).index)  # modules stay together


def test_limits_and_hidden_names_only_filter_and_rename():
    import asyncio
    root = Path(asyncio.__file__).parent
    hidden, few, named = (stdlib_code(*limits, root=root, hide_name=hide, cache=False) for limits, hide in (((), True), ((12, 8), True), ((), False)))
    assert 0 < len(few) < len(hidden) and max(len(d.split()) for d in few.doc) <= 12 and max(c.count("\n") + 1 for c in few.code) <= 8
    assert list(named.doc) == list(hidden.doc) and list(named.name) == list(hidden.name)
    assert all(re.match(rf"(async )?def {name}\s*\(", code) for name, code in zip(named.name, named.code))
    assert all(re.match(r"(async )?def f\s*\(", code) for code in hidden.code)


def test_the_same_in_another_process(pairs):
    code = "from kdbook.worlds.stdlib_code import stdlib_code; print(stdlib_code(cache=False).fingerprint)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": "5"})
    assert out.stdout.strip() == pairs.fingerprint


def test_pairs_behave_like_other_worlds(pairs):
    part = pairs[:7]
    assert len(part) == 7 and part.dataset().column_names == ["doc", "code", "name", "module"] and part.dataset()[3]["code"] == pairs.code[3]
    assert part.fingerprint != pairs.fingerprint and part.fingerprint == pairs[np.arange(7)].fingerprint and len(part.fingerprint) == 16
    assert len(pairs[pairs.module == pairs.module[0]]) >= 1


def test_a_small_library(library, own_cache):
    assert [p.name for p in library_files(library)] == ["alpha.py", "broken.py", "latin.py", "__init__.py", "beta.py"]
    pairs = stdlib_code(root=library)
    rows = {name: (doc, code, module) for doc, code, name, module in zip(pairs.doc, pairs.code, pairs.name, pairs.module)}
    assert rows == {
        "double": ("Return twice the number.", "def f(x):\n    y = 2 * x\n    return y", "alpha"),
        "open_lid": ("Lift the lid of the box.", 'async def f(self):\n    text = """no\nmargin"""\n    return text', "alpha"),
        "greet": ("Say good day in Köln.", 'def f():\n    return "ö"', "latin"),
        "again": ("Count down to zero.", "def f(n):\n    if n:\n        return f(n - 1)", "pack.deep.beta"),
    }  # the copy of double, the short description, the broken file, tests and encodings are not there
    assert rows["again"][1] != stdlib_code(root=library, hide_name=False).code[-1]


@pytest.mark.parametrize("source, expected", [
    ('def f(): "one two three"; return 1', []),
    ('def f(x):\n    "one two three"\n    return x', ["def f(x):\n    return x"]),
    ('def f(x):\n    "one two three"  # why\n    return x', ["def f(x):\n    return x"]),
    ('def f(x):\n    "one two three"; y = 1\n    return y', []),
    ('def f(x):\n    """only this"""', []),
    ('def f(x):\n    return x', []),
    ('@deco\ndef f(x,\n      y):\n    """one\n\n    two"""\n\n\n    # note\n    return x', ["def f(x,\n      y):\n    # note\n    return x"]),
    ('def f():\n    """é é"""\n    def g():\n        """inner doc here"""\n        return 1\n    return g', None),
    ('def f():\n    """a\x0cb"""\n    return 1', ["def f():\n    return 1"]),
])
def test_docstrings_are_cut_out_whole(source, expected):
    codes = [function.code for function in functions(source)]
    if expected is None:
        assert codes == ['def f():\n    def g():\n        """inner doc here"""\n        return 1\n    return g', "def g():\n    return 1"]
    else:
        assert codes == expected


def test_no_python_is_told():
    with pytest.raises(SyntaxError):
        list(functions("def"))


@pytest.mark.parametrize("by", ["module", "package", "function"])
def test_splits_are_disjoint_complete_and_stable(pairs, by):
    parts = split(pairs, by, seed=3)
    assert list(parts) == ["train", "valid", "test"] and sum(map(len, parts.values())) == len(pairs)
    assert {name: part.fingerprint for name, part in parts.items()} == {name: part.fingerprint for name, part in split(pairs, by, seed=3).items()}
    group = {"module": lambda p: set(p.module), "package": lambda p: {m.split(".")[0] for m in p.module}, "function": lambda p: set(p.code)}[by]
    groups = [group(part) for part in parts.values()]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2]) and all(groups)
    assert abs(len(groups[0]) / sum(map(len, groups)) - 0.8) < 0.1
    assert split(pairs, by, seed=4)["test"].fingerprint != parts["test"].fingerprint
    half = split(pairs[pairs.module < "m"], by, seed=3)  # other modules come and go, the rest stays where it is
    assert group(half["test"]) <= groups[2] and group(half["train"]) <= groups[0]


def test_shares(pairs):
    parts = split(pairs, seed=0, shares=(0.5, 0.0, 0.5))
    assert len(parts["valid"]) == 0 and 0.3 < len(parts["train"]) / len(pairs) < 0.7


def test_cache_is_used_checked_and_made_anew(library, own_cache, monkeypatch):
    first = stdlib_code(root=library)
    file, = own_cache.iterdir()
    calls = []
    real = world._collect
    monkeypatch.setattr(world, "_collect", lambda *a: calls.append(1) or real(*a))
    assert stdlib_code(root=library).fingerprint == first.fingerprint and not calls
    content = json.loads(gzip.decompress(file.read_bytes()))
    content["rows"][0][0] = "Something else entirely here."
    for damaged in (gzip.compress(json.dumps(content).encode()), b"", file.read_bytes()[:40], b"rubbish", gzip.compress(b"[]")):
        file.write_bytes(damaged)
        calls.clear()
        assert stdlib_code(root=library).fingerprint == first.fingerprint and calls
    calls.clear()
    stdlib_code(root=library, max_words=4)
    (library / "alpha.py").write_text('def one():\n    """Return the number one."""\n    return 1\n')
    assert "one" in stdlib_code(root=library).name and len(calls) == 2
    assert len(list(own_cache.iterdir())) == 3
    stdlib_code(root=library, max_words=5, cache=False)
    assert len(list(own_cache.iterdir())) == 3


def test_cache_that_cannot_be_written_is_a_warning(library, own_cache):
    own_cache.parent.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="could not be kept"):
        assert len(stdlib_code(root=library)) == 4


@pytest.mark.parametrize("call, error, message", [
    (lambda p: stdlib_code(max_words=2), ValueError, "max_words must be at least 3, got 2"),
    (lambda p: stdlib_code(max_lines=1), ValueError, "max_lines must be at least 2, got 1"),
    (lambda p: split(p, by="modul"), ValueError, "nearest: module"),
    (lambda p: split(p, shares=(0.5, 0.2, 0.2)), ValueError, "sum to 1"),
    (lambda p: stdlib_code(root="/nonexistent"), FileNotFoundError, "no Python source below"),
])
def test_wrong_use(call, error, message, pairs):
    with pytest.raises(error, match=message):
        call(pairs[:5])
