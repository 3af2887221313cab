"""The site: pages from executed notebooks, links, staging of a small book and of this one, the command."""
import base64
import json
import re
import shutil

import pytest
import yaml
from conftest import ROOT, make_chapter

pytest.importorskip("nbdev", reason="the site needs nbdev, which is in kdbook[dev]")

from kdbook.book import pages, site
from kdbook.book.chapters import PARTS, SECTIONS, notebooks
from kdbook.book.claims import MIME, Row

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAQAAAACCAIAAADwyuo0AAAAEElEQVR4nGP8z4AATEhsBgAZNQEDGy9LEgAAAABJRU5ErkJggg=="  # 4 x 2 pixels


def shown(data, metadata=None):
    return {"output_type": "display_data", "data": data, "metadata": metadata or {}}


def claim(id="better", margin=0.5, sentence="a < b & c"):
    return shown({MIME: {"kind": "claim", "id": id, "sentence": sentence, "margin": margin, "unit": "nats"}, "text/plain": "PLUMBING"})


def executed(chapter, outputs, seed=0, preset="tiny", source=None):
    """The run of a chapter with the given outputs of its last cell, as `kdbook run` leaves it."""
    notebook = json.loads(chapter.path.read_text())
    notebook["cells"][-1]["outputs"] = outputs
    notebook["metadata"]["kdbook"] = {"chapter": chapter.id, "preset": preset, "parameters": {"steps": 7, "rate": 0.5}, "seed": seed, "git": {"commit": "a" * 40, "dirty": False},
                                      "versions": {"torch": "2.13.0"}, "python": "3.11", "system": "Linux", "device": "cpu", "threads": 1, "seconds": 3.2, "peak_memory_mib": 90,
                                      "started": "2026-01-01T00:00:00Z", "source": source or "s", "figures": []}
    path = chapter.root / "runs" / preset / chapter.id / f"seed{seed}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook))
    return path


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A book of two chapters, one of them run, with this book's settings and assets."""
    monkeypatch.setenv("KDBOOK_ROOT", str(tmp_path))
    monkeypatch.delenv("KDBOOK_RUNS", raising=False)
    for name in ("_quarto.yml", "references.bib", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "nbs" / "site", tmp_path / "nbs" / "site")
    for name in ("foundations/losses", "foundations/models", "foundations/moe", "book/claims", "llm/other"):
        make_chapter(tmp_path, name, code=(f"# {name}", "x = 1"))
    main = make_chapter(tmp_path, "llm/taid", code=("#| default_exp llm.taid", "import math", "#| export\ndef double(x: float) -> float:\n    \"\"\"Twice `x`.\"\"\"\n    return 2 * x",
                                                    "#| hide\nsecret = 1", "save_figure(fig, 'line', alt='A line.')"))
    (tmp_path / "kdbook" / "llm").mkdir(parents=True)
    (tmp_path / "kdbook" / "llm" / "taid.py").write_text('"""Doubles."""\ndef double(x: float) -> float:\n    """Twice `x`."""\n    return 2 * x\n')
    index = json.loads(main.path.read_text())
    index["cells"] = [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# kdbook\n\nA book. See [TAID](https://github.com/kdbook/kdbook/blob/main/nbs/llm/taid.ipynb)."}]
    (tmp_path / "nbs" / "index.ipynb").write_text(json.dumps(index))
    run = executed(main, [{"output_type": "stream", "name": "stdout", "text": "a = `1`\n"}, {"output_type": "stream", "name": "stderr", "text": "WARNING"},
                          shown({"image/png": PNG, "text/plain": "<figure>"}, {"image/png": {"alt": 'The "line" <rises>.', "name": "line"}}), claim(), claim("worse", -1.0),
                          shown({"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "WIDGET"})])
    (run.parent / "figures").mkdir()
    (run.parent / "figures" / "seed0-line.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    return tmp_path


def test_chapter_page(small):
    staged = site.stage(partial=True)
    text = (staged.folder / "llm" / "taid.qmd").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["title"] == "Demo" and head["description"] == "You can do it." and head["image"] == "taid_figures/line.svg"
    for there in ("a = `1`", "[]{#double}", "kdbook run llm/taid", "colab.research.google.com/github/kdbook/kdbook/blob/main/nbs/llm/taid.ipynb", 'fig-alt="The &quot;line&quot; &lt;rises&gt;."',
                  'id="claim-better"', "a &lt; b &amp; c", "does not hold", "@inproceedings{taid,", "`steps=7`", "a" * 10, "2.13.0", "<summary>Imports</summary>", "<summary>Code of the figure</summary>"):
        assert there in text, there
    for absent in ("PLUMBING", "WARNING", "WIDGET", "secret", "default_exp", "vnd.", "base64", "steps: int = 5  # how many\n\n</details>"):
        assert absent not in text, absent
    assert "steps: int = 5" in text and (staged.folder / "llm" / "taid_figures" / "line.svg").is_file()
    assert staged.missing == tuple(c.id for c in notebooks(small) if c.id != "llm/taid")


def test_second_staging_writes_nothing_and_a_change_writes_its_page(small):
    first = site.stage(partial=True)
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    second = site.stage(partial=True, jobs=2)
    assert first.written and second.written == () and second.removed == ()
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before
    other = next(chapter for chapter in notebooks(small) if chapter.id == "book/claims")
    executed(other, [{"output_type": "stream", "name": "stdout", "text": "new\n"}])
    assert set(site.stage(partial=True).written) == {"book/claims.qmd", "gallery.qmd"}


def test_a_removed_notebook_takes_its_page_along(small):
    site.stage(partial=True)
    (small / "nbs" / "llm" / "other.ipynb").unlink()
    staged = site.stage(partial=True)
    assert "llm/other.qmd" in staged.removed and not (staged.folder / "llm" / "other.qmd").exists()
    assert "llm/other" not in (staged.folder / "_quarto.yml").read_text()


def test_missing_runs_stop_the_staging(small):
    with pytest.raises(site.MissingRuns, match="kdbook run .*llm/other"):
        site.stage()
    assert not (small / "_stage").exists()


def test_navigation_holds_every_notebook(small):
    staged = site.stage(partial=True)
    contents = yaml.safe_load((staged.folder / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    listed = [entry["href"] for section in contents for entry in section.get("contents", [])]
    assert listed == [f"{chapter.id}.qmd" for chapter in notebooks(small)]
    assert [s["section"] for s in contents if "section" in s] == [{**PARTS, **SECTIONS}[part] for part in ("llm", "foundations", "book")]


def test_ledger(small):
    staged = site.stage(partial=True)
    page, table = (staged.folder / "ledger.qmd").read_text(), (staged.folder / "ledger.csv").read_text()
    assert page.count("<tr data-part=") == 2 == len(table.splitlines()) - 1
    assert 'href="llm/taid.html#claim-worse"' in page and ">in the paper</th>" in page and 'data-verdict="one seed"' in page and "assets/forest-llm.svg" in page
    assert (staged.folder / "assets" / "forest-llm.svg").read_text().lstrip().startswith("<?xml")


def test_a_run_of_older_code_is_named_and_marked(small):
    from kdbook.book.runs import source_hash
    chapter = next(item for item in notebooks(small) if item.id == "llm/taid")
    staged = site.stage(partial=True)
    assert staged.stale == ("llm/taid",) and "the code has changed since this run" in (staged.folder / "llm" / "taid.qmd").read_text()
    path = small / "runs" / "tiny" / "llm" / "taid" / "seed0.ipynb"
    notebook = json.loads(path.read_text())
    notebook["metadata"]["kdbook"]["source"] = source_hash(chapter)
    path.write_text(json.dumps(notebook))
    staged = site.stage(partial=True)
    assert staged.stale == () and "the code has changed since this run" not in (staged.folder / "llm" / "taid.qmd").read_text()


def test_corrected_words_appear_without_a_new_run(small):
    source = small / "nbs" / "llm" / "taid.ipynb"
    notebook = json.loads(source.read_text())
    notebook["cells"].insert(1, {"cell_type": "markdown", "id": "new", "metadata": {}, "source": "A sentence added after the run."})
    source.write_text(json.dumps(notebook))
    page = (site.stage(partial=True).folder / "llm" / "taid.qmd").read_text()
    assert "A sentence added after the run." in page and "kd-claims" in page and "a = `1`" in page
    notebook["cells"][-1]["source"] = "other_code()"
    source.write_text(json.dumps(notebook))
    page = (site.stage(partial=True).folder / "llm" / "taid.qmd").read_text()
    assert "other_code" not in page and "A sentence added" not in page and "kd-claims" in page, "outputs must stand below the code that made them"


def row(**changes):
    values = dict(chapter="llm/taid", preset="tiny", claim="better", sentence="old", unit="nats", mean=1.0, low=0.5, high=1.5, seeds=5, verdict="reproduced",
                  margins=(), versions="", commit="", cell=0)
    return Row(**{**values, **changes})


def test_the_row_with_more_seeds_counts(small):
    from kdbook.book.claims import merge
    merge(small / "results" / "ledger.csv", [row(), row(claim="gone", mean=float("nan"), low=float("nan"), high=float("nan"), seeds=1, verdict="one seed"), row(chapter="llm/deleted")])
    rows = {r.claim: r for r in site.all_rows(small, small / "runs", tuple(notebooks(small)))}
    assert rows["better"].seeds == 5 and rows["worse"].seeds == 1 and "gone" in rows and all(r.chapter != "llm/deleted" for r in rows.values())


def test_forest_plot_takes_every_kind_of_row():
    nan = float("nan")
    rows = [row(), row(mean=-1.0, low=-2.0, high=-0.5, verdict="contradicted"), row(mean=0.0, low=0.0, high=0.0, verdict="inconclusive"), row(low=nan, high=nan, verdict="one seed"),
            row(mean=nan, low=nan, high=nan, verdict="inconclusive")]
    assert site.forest_plot(rows, "Part") == site.forest_plot(rows, "Part")


@pytest.mark.parametrize("mistake, message", [
    ("[x](llm/nothing.html)", "leads nowhere"), ("[x](llm/taid.html#nothing)", "anchor"), ("[x](#nothing)", "anchor"), ("![](assets/hero.svg)", "alt text"),
    ("![a](assets/no.svg)", "leads nowhere"), ("As @nobody2020 says", "references.bib"), ('```{=html}\n<a href="gone.html">x</a>\n```', "leads nowhere"),
    ('```{=html}\n<img src="assets/hero.svg" alt="">\n```', "alt text"), ("[]{#symbols}", "twice")])
def test_check_finds(small, mistake, message):
    staged = site.stage(partial=True)
    assert site.check(staged.folder) == []
    path = staged.folder / "notation.qmd"
    path.write_text(path.read_text() + f"\n{mistake}\n")
    assert any(message in problem for problem in site.check(staged.folder))


@pytest.mark.parametrize("fine", ["mail a@b.org", "`@nobody`", "```python\n@decorator\n![](x)\n```", "$$a@b$$", "\\@nobody"])
def test_check_leaves_alone(small, fine):
    staged = site.stage(partial=True)
    path = staged.folder / "notation.qmd"
    path.write_text(path.read_text() + f"\n{fine}\n")
    assert site.check(staged.folder) == []


def test_links_to_pages_that_do_not_exist_become_text(small):
    path = small / "nbs" / "llm" / "other.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"].append({"cell_type": "markdown", "id": "z", "metadata": {}, "source": "See [new](../llm/new.ipynb) and [claims](../book/claims.ipynb)."})
    path.write_text(json.dumps(notebook))
    staged = site.stage(partial=True)
    assert staged.lost == {"llm/other": ("../llm/new.ipynb",)}
    assert "See new and [claims](../book/claims.html)." in (staged.folder / "llm" / "other.qmd").read_text()


@pytest.mark.parametrize("text", ["```\nfake fence\n```", "````", "plain", "a\n`````\nb"])
def test_fenced_cannot_be_closed_from_inside(text):
    block = pages.fenced(text)
    mark = block.split("\n")[0]
    assert block.startswith("```") and block.split("\n")[1:-1] == text.split("\n") and mark not in text


def test_heavy_and_pixel_figures_are_png(tmp_path):
    (tmp_path / "seed0-a.svg").write_text("<svg><image/></svg>")
    (tmp_path / "seed0-b.svg").write_bytes(b" " * (pages.HEAVY + 1))
    (tmp_path / "seed0-b.png").write_bytes(b"png")
    assert pages.figure_file(tmp_path, 0, "a", PNG) == ("a.png", base64.b64decode(PNG))
    assert pages.figure_file(tmp_path, 0, "b", PNG) == ("b.png", tmp_path / "seed0-b.png")


@pytest.mark.parametrize("text, reason", [("@misc{a,\n  title = {x\n}\n", "line of its own"), ("@misc{a,\n  year = {1},\n}\n@misc{a,\n  year = {1},\n}\n", "twice")])
def test_bad_bibtex_is_told(text, reason):
    with pytest.raises(ValueError, match=reason):
        site.read_bibtex(text)


def test_references_are_complete():
    works = site.read_bibtex((ROOT / "references.bib").read_text(encoding="utf-8"))
    assert len(works) >= 70
    for work in works.values():
        place = {"inproceedings": "booktitle", "article": "journal", "misc": "howpublished"}[work.kind]
        assert {"title", "author", "year", "url", "eprint", place} <= set(work.fields), work.key
        assert re.fullmatch(r"(19|20)\d\d", work.fields["year"]) and re.fullmatch(r"\d{4}\.\d{4,5}", work.fields["eprint"]), work.key


def test_every_paper_is_in_the_references(shared):
    works = site.read_bibtex((ROOT / "references.bib").read_text(encoding="utf-8"))
    for path in sorted((shared / "papers").glob("*/*.md")):
        assert path.stem in works and works[path.stem].fields["eprint"] in path.read_text(encoding="utf-8")[:2000], path.stem


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """This book, staged from the runs that are there."""
    return site.stage(root=ROOT, folder=tmp_path_factory.mktemp("site") / "stage", partial=True)


def test_this_book_has_no_broken_link_citation_figure_or_entry(whole):
    assert site.check(whole.folder) == [] and whole.lost == {}


def test_every_exported_name_is_in_the_reference(whole):
    for module in pages.modules(ROOT):
        text = (whole.folder / module.reference.replace(".html", ".qmd")).read_text()
        assert all(f"{{#{name.name}}}" in text for name in module.names)


def test_nothing_is_asked_of_another_host(whole):
    """Links may lead elsewhere; what a browser loads by itself may not."""
    loads = re.compile(r"""(?:src|srcset|data)\s*=\s*["'](?:https?:)?//|url\(\s*["']?(?:https?:)?//|@import|(?:fetch|import|importScripts)\(\s*["'](?:https?:)?//|<link[^>]+href=["'](?:https?:)?//""")
    for path in whole.folder.rglob("*"):
        if path.suffix in (".css", ".scss", ".js", ".html", ".svg"):
            assert not loads.search(path.read_text(encoding="utf-8")), path
        if path.suffix == ".qmd":
            assert not loads.search(site._visible(path.read_text(encoding="utf-8"))[2]), path


def test_pages_are_light(whole):
    for path in whole.folder.rglob("*.qmd"):
        files = path.with_name(path.stem + "_figures")
        assert path.stat().st_size + sum(f.stat().st_size for f in files.glob("*")) <= 1_500_000, path


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pandoc") is None, reason="pandoc is not installed")
def test_pandoc_reads_every_page_without_a_warning(whole):
    import subprocess
    names = sorted(str(path.relative_to(whole.folder)) for path in whole.folder.rglob("*.qmd"))
    command = ["pandoc", "-f", "markdown", "-t", "html5", "--mathml", "--standalone", "--citeproc", "--bibliography", "references.bib", "--metadata", "pagetitle=x", "-o", "/dev/null"]
    together = subprocess.run([*command, "--file-scope", *names], cwd=whole.folder, capture_output=True, text=True)
    if together.stderr or together.returncode:
        told = {name: done.stderr for name in names if (done := subprocess.run([*command, name], cwd=whole.folder, capture_output=True, text=True)).stderr}
        assert told == {} and together.returncode == 0, together.stderr


@pytest.mark.skipif(shutil.which("pandoc") is None, reason="pandoc is not installed")
def test_plain_html(whole, tmp_path):
    made = site.plain(whole.folder, tmp_path, ["index.qmd", "llm/taid.qmd"], jobs=2)
    text = made[1].read_text()
    assert [path.name for path in made] == ["index.html", "taid.html"] and "<math" in text and "../assets/kdbook.css" in text
    assert all(re.search(r'alt="[^"]+"', tag) for tag in re.findall(r"<img[^>]*>", text))


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_scripts_parse():
    import subprocess
    for path in (ROOT / "nbs" / "site" / "assets").glob("*.js"):
        subprocess.run(["node", "--check", str(path)], check=True, capture_output=True)


def command():
    """The command in a shell of its own, whether or not the command line knows it already."""
    import typer
    app = typer.Typer()
    app.command("site")(site.site)
    return app


def invoke(*words):
    from typer.testing import CliRunner
    return CliRunner().invoke(command(), list(words))


def test_command_names_missing_runs(small):
    answer = invoke("--stage-only")
    assert answer.exit_code == 2 and "kdbook run" in answer.output and "llm/other" in answer.output


def test_command_stages(small):
    answer = invoke("--stage-only", "--partial", "--jobs", "1")
    assert answer.exit_code == 0 and "pages" in answer.output and (small / "_stage" / "index.qmd").is_file()


def test_command_says_how_to_get_quarto(small, monkeypatch):
    monkeypatch.setenv("PATH", "")
    answer = invoke("--partial", "--jobs", "1")
    assert answer.exit_code == 2 and "quarto.org" in answer.output and (small / "_stage" / "index.qmd").is_file()


def test_command_renders_with_quarto(small, monkeypatch, tmp_path):
    """A stand-in for Quarto that makes one page shows that its output ends up in _site."""
    tool = tmp_path / "bin" / "quarto"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nmkdir -p "$2/_site" && echo "$@" > "$2/_site/index.html"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    answer = invoke("--partial", "--jobs", "1")
    assert answer.exit_code == 0 and (small / "_site" / "index.html").read_text().startswith("render ")


@pytest.mark.parametrize("words", [["--preset", "nope"], ["--stage-only", "--preview"], ["--jobs", "-1"]])
def test_command_refuses(small, words):
    assert invoke(*words).exit_code == 2


def test_an_installed_copy_has_no_site(tmp_path):
    (tmp_path / "nbs" / "foundations").mkdir(parents=True)
    with pytest.raises(ValueError, match="checkout"):
        site.read_book(tmp_path)


def test_thumbnails():
    """The gallery's pictures fit their card at two pixels a point, keep their shape, stand on white and are not blown up."""
    import io

    from PIL import Image

    def made(size, colour, **options):
        stream = io.BytesIO()
        Image.new("RGBA", size, colour).save(stream, "PNG")
        return Image.open(io.BytesIO(pages.thumbnail(stream.getvalue(), **options)))

    assert made((2000, 1000), "red").size == (544, 272) and made((1000, 2000), "red").size == (160, 320)
    assert made((40, 20), "red").size == (40, 20) and made((400, 200), "red", width=100, height=100).size == (100, 50)
    clear = made((40, 20), (0, 0, 0, 0))
    assert clear.format == "WEBP" and min(clear.convert("RGB").getpixel((20, 10))) > 250
