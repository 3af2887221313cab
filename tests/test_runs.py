"""Runs: cache, failure, resume, determinism, locking, kernels. Every run here has a kernel of its own, so the chapters are tiny."""
import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import make_chapter
from kdbook.book.chapters import chapters
from kdbook.book import runs
from kdbook.book.runs import (RunError, describe_failure, device_kind, end_kernels, imported_modules, module_files, plan, run, run_all, source_hash, stripped,
                              threads_for, variant)

CLAIMING = ("from kdbook.book.claims import claim, record\nrecord('steps', steps)\nclaim('a', 'a holds', steps - 1, 'x')\nopen(out_dir + '/fig.png', 'w').write('x')")


def files(folder: Path) -> dict:
    """All files below a folder with their bytes, except locks."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"}


def test_a_run_leaves_notebook_figures_records_and_provenance(book):
    make_chapter(book, code=(CLAIMING,))
    seen = []
    result = run("llm/demo", params={"rate": 0.25}, seed=3, progress=lambda cell, cells: seen.append((cell, cells)))
    assert result.path == book / "runs/tiny/llm/demo/rate=0.25/seed3.ipynb" and not result.cached
    assert [f.name for f in result.figures] == ["seed3-fig.png"] and result.figures[0].is_file()
    assert result.records == {"steps": 5.0} and result.claims[0]["margin"] == 4.0
    meta = json.loads(result.path.read_text())["metadata"]["kdbook"]
    assert meta["parameters"] == {"steps": 5, "rate": 0.25, "name": "x", "flag": False, "sizes": [1, 2], "seed": 3, "device": "cpu"}
    assert meta["threads"] == 1 and meta["device"] == "cpu" and meta["versions"]["torch"] and meta["seconds"] > 0 and meta["peak_memory_mib"] > 10
    records = json.loads((result.path.parent / "records.json").read_text())
    assert records["seed3"]["claims"][0]["id"] == "a" and "seconds" not in json.dumps(records)
    assert seen and seen[0][1] == seen[-1][1] > seen[-1][0]
    assert sorted(p.name for p in result.path.parent.iterdir() if not p.name.startswith(".")) == ["figures", "records.json", "seed3.ipynb"]
    assert str(book) not in result.path.read_text().split('"kdbook": {')[0], "the notebook names a folder of this machine"


def test_the_same_run_is_reused_and_a_change_runs_again(book):
    first = run("llm/demo")
    before = files(book / "runs")
    assert run("llm/demo").cached and files(book / "runs") == before
    make_chapter(book, code=("print(steps + 1)",))
    assert not run("llm/demo").cached
    notebook = json.loads((book / "nbs/llm/demo.ipynb").read_text())
    notebook["cells"][0]["source"] = "# Another title\n\n> with other words"
    (book / "nbs/llm/demo.ipynb").write_text(json.dumps(notebook))
    assert run("llm/demo").cached, "prose must not cost a run"
    assert not run("llm/demo", force=True).cached
    assert not run("llm/demo", params={"steps": 6}).cached and run("llm/demo", params={"steps": 5}).cached
    assert first.path.is_file()


def test_two_runs_have_identical_records(book):
    make_chapter(book, code=("import torch, random, numpy\nfrom kdbook.training import seed_everything\nfrom kdbook.book.claims import record\nseed_everything(seed)",
                             "record('t', torch.randn(100, 100).matmul(torch.randn(100, 100)).sum())\nrecord('r', random.random())\nrecord('h', hash('text') % 1000)"))
    run("llm/demo")
    first = (book / "runs/tiny/llm/demo/records.json").read_bytes()
    run("llm/demo", force=True)
    assert (book / "runs/tiny/llm/demo/records.json").read_bytes() == first and len(json.loads(first)["seed0"]["records"]) == 3


def test_a_missing_figure_or_half_a_notebook_is_made_again(book):
    make_chapter(book, code=(CLAIMING,))
    result = run("llm/demo")
    result.figures[0].unlink()
    assert not run("llm/demo").cached and result.figures[0].is_file()
    result.path.write_text(result.path.read_text()[:200])
    assert not run("llm/demo").cached


def test_a_failing_cell_is_named_and_earlier_results_stay(book):
    make_chapter(book, code=(CLAIMING,))
    run("llm/demo")
    before = files(book / "runs")
    make_chapter(book, code=("x = 1", "def f(y):\n    return y / 0\n\nf(x)"))
    with pytest.raises(RunError) as error:
        run("llm/demo")
    message = str(error.value)
    assert "llm/demo: cell 4 of 4, line 2: return y / 0" in message and "ZeroDivisionError: division by zero" in message
    after = files(book / "runs")
    failed = after.pop("tiny/llm/demo/seed0.failed.ipynb")
    assert after == before and b"division by zero" in failed and error.value.path.is_file()
    make_chapter(book, code=("x = 2",))
    run("llm/demo")
    assert not error.value.path.exists(), "a success removes the failed notebook"


def test_an_error_inside_kdbook_names_the_module_too(book):
    make_chapter(book, code=("import torch\nfrom kdbook.losses import forward_kl\n\nforward_kl(torch.zeros(2), torch.zeros(3))",))
    with pytest.raises(RunError, match=r"line 4: forward_kl.*\n.*ValueError.*losses.py, line \d+"):
        run("llm/demo")


def test_syntax_errors_and_wrong_claims_fail_like_others(book):
    make_chapter(book, code=("y = = 1",))
    with pytest.raises(RunError, match="cell 3 of 3, line 1: y = = 1\nSyntaxError"):
        run("llm/demo")
    make_chapter(book, code=(CLAIMING, "claim('a', 'again', 1)"))
    with pytest.raises(RunError, match="claim 'a' was made twice"):
        run("llm/demo")


def test_a_kernel_that_dies_is_said_so(book):
    make_chapter(book, code=("import os\nprint('going', flush=True)", "os.write(2, b'out of paper'); os._exit(9)"))
    with pytest.raises(RunError, match="the kernel died in cell 4 of 4.*\nits last words: .*out of paper"):
        run("llm/demo")
    assert (book / "runs/tiny/llm/demo/seed0.failed.ipynb").is_file() and not (book / "runs/tiny/llm/demo/seed0.ipynb").exists()


def test_nothing_is_written_before_the_values_are_checked(book):
    for wrong in ({"params": {"stps": 1}}, {"params": {"steps": "x"}}, {"preset": "huge"}, {"params": {"device": "cuda:77"}}):
        with pytest.raises(ValueError):
            run("llm/demo", **wrong)
    with pytest.raises(ValueError, match="unknown chapter"):
        run("llm/dem0x")
    assert not (book / "runs").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_folder_that_cannot_be_written(book, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(RunError, match="llm/demo: cannot write to"):
        run("llm/demo", runs=blocked)
    assert blocked.read_text().startswith("a file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_keeps_the_earlier_result(book, monkeypatch):
    make_chapter(book, code=(CLAIMING,))
    run("llm/demo")
    before = files(book / "runs")
    import kdbook.book.runs as runs
    write = runs.Path.write_text

    def full(self, *args, **kwargs):
        if self.name == "run.ipynb":
            with open("/dev/full", "w") as device:
                device.write("x")
        return write(self, *args, **kwargs)

    monkeypatch.setattr(runs.Path, "write_text", full)
    with pytest.raises(RunError, match="No space left on device"):
        run("llm/demo", force=True)
    assert files(book / "runs") == before


def test_many_runs_go_on_after_a_failure(book):
    make_chapter(book, "llm/bad", code=("raise RuntimeError('no')",))
    done = []
    jobs = plan(chapters(), "tiny", seeds=2)
    outcomes = run_all(jobs, workers=2, on_done=lambda job, outcome: done.append(job))
    assert [type(o).__name__ for o in outcomes] == ["RunError", "RunError", "RunResult", "RunResult"] and len(done) == 4
    assert [o.seed for o in outcomes[2:]] == [0, 1]
    assert set(json.loads((book / "runs/tiny/llm/demo/records.json").read_text())) == {"seed0", "seed1"}
    again = run_all(jobs[2:], workers=2)
    assert all(o.cached for o in again)


def test_any_executor_will_do(book):
    with ThreadPoolExecutor(1) as pool:
        outcome, = run_all(plan(chapters(), "tiny"), executor=pool)
        assert outcome.path.is_file()
        assert pool.submit(lambda: 1).result() == 1, "an executor that was given must stay open"


def test_plans_are_checked(book):
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        plan(chapters(), "tiny", seeds=0)
    with pytest.raises(ValueError, match="jobs must be at least 1"):
        run_all([], workers=0)
    with pytest.raises(ValueError, match="seed must be >= 0"):
        plan(chapters(), "tiny", {"seed": -1})
    assert [job.seed for job in plan(chapters(), "tiny", {"seed": 4, "steps": 9}, seeds=2)] == [4, 5]
    make_chapter(book, "llm/seedless", parameters="steps: int = 1")
    with pytest.raises(ValueError, match="no parameter seed"):
        plan(chapters(), "tiny", seeds=2)


def _run_in_process(root, queue):
    os.environ["KDBOOK_ROOT"] = root
    queue.put(run("llm/demo").cached)


def test_two_processes_share_one_run(book):
    make_chapter(book, code=("import time\ntime.sleep(1)\nprint(steps)",))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_run_in_process, args=(str(book), queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert sorted(queue.get(timeout=120) for _ in workers) == [False, True]
    for worker in workers:
        worker.join()


def test_interrupting_ends_kernels_and_leaves_nothing_half_written(book):
    make_chapter(book, code=("import os\nopen(os.environ['KDBOOK_ROOT'] + '/pid', 'w').write(str(os.getpid()))", "import time\ntime.sleep(120)"))
    code = "from kdbook.book.cli import main\nimport sys\nsys.argv = ['kdbook', 'run', 'demo']\nmain()"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "KDBOOK_ROOT": str(book)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell lets its background jobs ignore it
    deadline = time.monotonic() + 60
    while not (book / "pid").exists() or not (book / "pid").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in err and "Traceback" not in err + out
    kernel = int((book / "pid").read_text())
    import psutil
    assert not psutil.pid_exists(kernel) or psutil.Process(kernel).status() == psutil.STATUS_ZOMBIE
    assert not [path for path in (book / "runs").rglob("*") if path.is_file() and path.suffix not in (".lock",)]


def test_a_killed_book_run_continues_where_it_was(book):
    make_chapter(book, "llm/a", code=(CLAIMING,))
    make_chapter(book, "llm/slow", code=("import os\nopen(os.environ['KDBOOK_ROOT'] + '/slow', 'w').write('x')\nimport time\ntime.sleep(120 if not flag else 0)",))
    (book / "nbs/llm/demo.ipynb").unlink()
    process = subprocess.Popen([sys.executable, "-c", "from kdbook.book.cli import main; import sys; sys.argv = ['kdbook', 'run', '--all']; main()"],
                               env={**os.environ, "KDBOOK_ROOT": str(book)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (book / "slow").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    make_chapter(book, "llm/slow", code=("print('now quick')",))
    outcomes = run_all(plan(chapters(), "tiny"))
    assert [o.cached for o in outcomes] == [True, False]
    assert not list((book / "runs").rglob(".seed*.part"))


def test_what_a_run_depends_on(book, root):
    code = "import kdbook.plots\nfrom kdbook.llm.taid import taid_loss\nfrom kdbook import losses\nimport numpy\n%matplotlib inline\n!ls"
    assert imported_modules(code) == {"kdbook.plots", "kdbook.llm.taid", "kdbook.llm.taid.taid_loss", "kdbook", "kdbook.losses"}
    found = module_files({"kdbook.training"}, root / "kdbook")
    assert {"kdbook.training", "kdbook.plots"} <= set(found)
    make_chapter(book, code=("from kdbook.plots import panels",))
    one = source_hash(chapters()[0])
    make_chapter(book, code=("from kdbook.plots import band",))
    assert source_hash(chapters()[0]) != one


def test_words_do_not_count_as_a_change_and_code_does(book, root, tmp_path):
    make_chapter(book, code=("# one way to say it\nfrom kdbook.plots import panels",))
    one = source_hash(chapters()[0])
    make_chapter(book, code=("from kdbook.plots import panels  # another way",))
    assert source_hash(chapters()[0]) == one
    make_chapter(book, code=("%matplotlib inline\nfrom kdbook.plots import panels",))
    assert source_hash(chapters()[0]) != one
    assert stripped('class A:\n    """x"""\n    b = "y"') == stripped('class A:\n    b = "y"  # z') != stripped('class A:\n    b = "z"')
    path = tmp_path / "m.py"
    hashes = []
    for number, text in enumerate(('"""Doc."""\nX = 1\n', '"""Other."""\nX = 1\n', '"""Other."""\nX = 2\n')):
        path.write_text(text)
        os.utime(path, ns=(number, number))
        hashes.append(runs._module_of(path, "kdbook.m")[1])
    assert hashes[0] == hashes[1] != hashes[2]


def test_names_of_variants(book):
    demo = chapters()[0]
    values = {"steps": 5, "rate": 0.5, "name": "x", "flag": False, "sizes": [1, 2], "seed": 9, "device": "cpu"}
    assert variant(demo, "tiny", values) == ""
    assert variant(demo, "tiny", {**values, "steps": 6, "rate": 0.1}) == "rate=0.1,steps=6"
    one, two = (variant(demo, "tiny", {**values, "name": name}) for name in ("a/../b", "a_.._b"))
    assert "/" not in one and one != two
    assert len(variant(demo, "tiny", {**values, "name": "y" * 400})) < 80


def test_threads():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert threads_for("tiny", 1) == 1 and threads_for("real", 1) == cores and threads_for("real", 10 * cores) == 1
    assert device_kind("cpu") == "cpu"


def test_plain_papermill_runs_a_chapter(book, tmp_path):
    import papermill
    (tmp_path / "p.yaml").write_text("steps: 12\n")
    done = subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", str(book / "nbs/llm/demo.ipynb"), str(tmp_path / "out.ipynb"), "-f", str(tmp_path / "p.yaml"), "-k", "python3"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "12" in "".join(output["text"] if isinstance(output.get("text"), str) else "".join(output.get("text", []))
                           for cell in json.loads((tmp_path / "out.ipynb").read_text())["cells"] for output in cell.get("outputs", []))
