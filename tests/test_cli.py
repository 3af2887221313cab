"""The command line as a person uses it: answers, exit codes, where output goes."""
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from conftest import make_chapter
from kdbook.book.cli import app

CLAIM = "from kdbook.book.claims import claim\nclaim('c', 'more steps than none', steps + seed * 0.01, 'steps')\nopen(out_dir + '/f.png', 'w').write('x')"


def kdbook(*words):
    """(exit code, output, errors) of a command in this process."""
    result = CliRunner().invoke(app, list(words))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def shell(*words, **env):
    """The same in a process of its own, with pipes."""
    code = "import sys; sys.argv[0] = 'kdbook'; from kdbook.book.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env={**os.environ, **env})


def test_help_and_lists_import_nothing_heavy(book):
    code = ("import sys; sys.argv = ['kdbook', *sys.argv[1:]]\nfrom kdbook.book.cli import main\ntry:\n    main()\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'transformers', 'papermill', 'pandas', 'matplotlib', 'datasets', 'scipy', 'sklearn', 'nbconvert'} & set(sys.modules)\nassert not heavy, heavy")
    for words in (["--help"], ["list"], ["list", "demo"], ["run", "--help"], ["data", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr)


def test_list(book):
    code, out, _ = kdbook("list")
    assert code == 0 and "llm/demo" in out and "Demo" in out and "Language models" in out
    code, out, _ = kdbook("list", "llm/demo")
    assert "steps: int = 5  (how many)" in out and "presets: tiny" in out and "You can do it." in out
    code, _, err = kdbook("list", "llm/demoo")
    assert code == 2 and "did you mean llm/demo" in err


def test_run_prints_paths_last(book):
    make_chapter(book, code=(CLAIM,))
    done = shell("run", "demo", "-p", "steps=7", "--seeds", "2", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sorted(lines[:2])[0].startswith("llm/demo tiny seed 0: ") and "1 of 1 claims hold" in lines[0]
    assert lines[2].endswith("steps=7/seed0.ipynb") and lines[3].strip().endswith("figures/seed0-f.png") and lines[5].strip().endswith("seed1-f.png")
    assert done.stderr == "", "piped, a run that succeeds says nothing on the error stream"
    again = shell("run", "demo", "-p", "steps=7", "--seeds", "2")
    assert again.stdout.count("unchanged, reused") == 2


def test_a_failed_chapter_does_not_stop_the_others(book):
    make_chapter(book, "llm/bad", code=("x = 1\nraise ValueError('on purpose')",))
    done = shell("run", "llm")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "failed: llm/bad: cell 3 of 3, line 2" in done.stderr and "ValueError: on purpose" in done.stderr and "1 of 2 runs failed" in done.stderr
    assert "llm/demo tiny seed 0" in done.stdout and (book / "runs/tiny/llm/bad/seed0.failed.ipynb").is_file()


@pytest.mark.parametrize("words, message", [
    (["run"], "name chapters or parts to run, or give --all"), (["run", "demo", "--all"], "not both"), (["run", "llm/dem"], "did you mean llm/demo"),
    (["run", "demo", "--preset", "big"], "no preset 'big'"), (["run", "demo", "-p", "steps"], "-p takes name=value, got 'steps'"),
    (["run", "demo", "-p", "=3"], "-p takes name=value"), (["run", "demo", "-p", "stepz=3"], "did you mean steps"),
    (["run", "demo", "-p", "steps=three"], "steps must be int, got 'three'"), (["run", "demo", "--jobs", "0"], "--jobs must be at least 1, got 0"),
    (["run", "demo", "--seeds", "0"], "--seeds must be at least 1, got 0"), (["run", "demo", "--seeds", "x"], "as an integer"),
    (["run", "demo", "-p", "device=cuda:9"], "device must be one of"), (["run", "demo", "-f", "absent.yaml"], "cannot read absent.yaml"),
    (["run", "demo", "-p", "out_dir=x"], "set by the run"), (["report", "demo"], "no claims from preset tiny"), (["report", "--format", "pdf"], "table, markdown or csv"),
    (["report", "--preset", "none"], "unknown preset"), (["new", "nlp/x"], "the part must be one of"), (["new", "llm/My-Chapter"], "lower-case Python name"),
    (["new", "llm/class"], "lower-case Python name"), (["new", "llm/demo"], "exists already"), (["frobnicate"], "No such command")])
def test_wrong_use_is_exit_code_2_and_writes_nothing(book, words, message):
    before = sorted(book.rglob("*"))
    code, out, err = kdbook(*words)
    assert code == 2 and message in " ".join((out + err).replace("│", " ").split()), (out, err)
    assert "Traceback" not in err and sorted(book.rglob("*")) == before


def test_parameters_from_a_file(book):
    (book / "p.yaml").write_text("steps: 3\nrate: 0.125\n")
    assert shell("run", "demo", "-f", str(book / "p.yaml"), "-p", "steps=4").returncode == 0
    assert (book / "runs/tiny/llm/demo/rate=0.125,steps=4/seed0.ipynb").is_file()
    (book / "p.yaml").write_text("steps: {a: 1}\n")
    code, _, err = kdbook("run", "demo", "-f", str(book / "p.yaml"))
    assert code == 2 and "must be flat" in err


def test_report_in_all_forms_and_the_ledger(book):
    make_chapter(book, code=(CLAIM,))
    assert shell("run", "demo", "--seeds", "3").returncode == 0
    code, out, _ = kdbook("report")
    assert code == 0 and "reproduced" in out and "more steps than none" in out
    code, out, _ = kdbook("report", "--format", "markdown")
    assert "| llm/demo | more steps than none | +5.01 [" in out
    code, out, err = kdbook("report", "--format", "csv", "--write")
    assert out.startswith("chapter,preset,claim,verdict,") and out.splitlines()[1].startswith("llm/demo,tiny,c,reproduced,5.01,")
    assert (book / "results/ledger.csv").read_text() == out and "1 rows" in err
    make_chapter(book, code=(CLAIM, "print('a newer version')"))
    assert shell("run", "demo").returncode == 0
    assert "2 runs of an older version left out" in kdbook("report")[1]


def test_new_gives_a_chapter_that_runs(book):
    code, out, _ = kdbook("new", "selfdistill/my_method", "--title", "My method")
    assert code == 0 and "nbs/selfdistill/my_method.ipynb" in out
    done = shell("run", "my_method", "-p", "steps=30")
    assert done.returncode == 0, done.stderr
    assert "accuracy.png" in done.stdout
    notebook = json.loads((book / "nbs/selfdistill/my_method.ipynb").read_text())
    assert notebook["cells"][0]["source"][0] == "# My method\n" and any("my_method_loss" in "".join(cell["source"]) for cell in notebook["cells"])


def test_verbose_shows_papermills_log(book):
    done = shell("run", "demo", "-v")
    assert done.returncode == 0 and "Executing Cell" in done.stderr


def test_doctor(book):
    code, out, _ = kdbook("doctor")
    assert code == 0 and "torch" in out and "devices" in out and "quarto" in out and str(book) in out


def test_a_reader_that_stops_listening_is_no_error(book):
    code = "import sys; sys.argv = ['kdbook', 'list', '--all']; from kdbook.book.cli import main; main()"
    done = subprocess.run(f'"{sys.executable}" -c "{code}" | true', shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_data_list_get_and_verify(book, real_data, tmp_path):
    code, out, _ = kdbook("data", "list", "--hub")
    assert code == 0 and "sst2" in out and "cached" in out and "CC-BY" in out and "hub:" in out and str(real_data) in out
    code, out, _ = kdbook("data", "verify", "sst2", "digits")
    assert code == 0 and "sst2: 3 ok" in out
    code, out, err = kdbook("data", "get", "sst2")
    assert code == 0 and "sst2: 3 files" in out and "Commercial use is not granted" in out + err
    for words, message in ((["get"], "or give --all"), (["get", "sst"], "did you mean sst2"), (["get", "sst2", "--jobs", "0"], "--jobs must be"), (["verify", "nope"], "there are: ")):
        code, out, err = kdbook("data", *words)
        assert code == 2 and message in err


def test_data_that_is_absent_or_broken_is_exit_code_1(book, shared, tmp_path, monkeypatch):
    monkeypatch.setenv("KDBOOK_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    code, _, err = kdbook("data", "get", "sst2")
    assert code == 1 and "kdbook data get sst2" in err and "SHA-256" in err
    (tmp_path / "cache" / "sst2").mkdir(parents=True, exist_ok=True)
    for name in ("train", "dev", "test"):
        (tmp_path / "cache" / "sst2" / f"{name}.tsv").write_text("changed")
    code, _, err = kdbook("data", "verify", "sst2")
    assert code == 1 and "train.tsv: wrong length" in err
