"""Real data: loading, licences, hashes, and everything that can go wrong with a download."""
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from kdbook import data

TEXT = b"".join(b"a sentence that is rather long, number %d\t%d\n" % (i, i % 2) for i in range(4000))


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Server:
    """A file server on 127.0.0.1 whose manners can be chosen; `log` holds (path, first byte, bytes sent)."""

    def __init__(self):
        self.files, self.log, self.breaks, self.ranges, self.slow = {}, [], 0, True, 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                content = outer.files.get(self.path)
                if content is None:
                    self.send_error(404)
                    return
                start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if outer.ranges else 0
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                end = len(content)
                if outer.breaks > 0:
                    outer.breaks -= 1
                    end = start + (end - start) // 2
                    self.close_connection = True
                outer.log.append((self.path, start, end - start))
                for at in range(start, end, 1 << 14):
                    try:
                        self.wfile.write(content[at:min(end, at + (1 << 14))])
                        self.wfile.flush()
                    except OSError:
                        return
                    time.sleep(outer.slow)

            def log_message(self, *_):
                """Silence."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server.server_port}{path}"


@pytest.fixture
def server():
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KDBOOK_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "_announced", set())
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch):
    """Any attempt to connect fails at once."""
    import requests

    def refuse(url, **_):
        raise requests.ConnectionError(f"no network for {url}")
    monkeypatch.setattr(requests, "get", refuse)


@pytest.fixture
def small_sets(server, monkeypatch, cache):
    """The data sets sst2 (three files) and tiny_shakespeare, served by the test's own server."""
    contents = {"sst2": {f"{part}.tsv": TEXT[:size] for part, size in (("train", 46 * 400), ("dev", 45 * 2), ("test", 45 * 4))},
                "tiny_shakespeare": {"input.txt": b"To be, or not to be. " * 500}}
    for name in contents["sst2"]:
        contents["sst2"][name] = contents["sst2"][name].rpartition(b"\n")[0]
    real, table = data._table("data"), {}
    for name, files in contents.items():
        table[name] = real[name] | {"url": server.url(f"/{name}/"), "files": {file: [len(c), sha(c)] for file, c in files.items()}}
        server.files |= {f"/{name}/{file}": c for file, c in files.items()}
    monkeypatch.setattr(data, "_table", {"data": table, "hub": data._table("hub")}.__getitem__)
    return contents


# --- what is known without a file ---------------------------------------------------------------------------------------------------

def test_import_is_light():
    heavy = "torch datasets pooch pandas pyarrow requests sklearn tqdm"
    code = f"import sys, kdbook.data; print([m for m in {heavy.split()} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_table_is_complete():
    sets = {s.name: s for s in data.data_sets()}
    assert len(sets) == 19 and sets.keys() == data._LOADERS.keys()
    for s in sets.values():
        assert s.what and s.licence and len(s.citation) > 20 and s.source and s.splits and s.columns
        assert s.files == len(data.data_files(s.name)) and s.bytes == sum(f.bytes for f in data.data_files(s.name).values())
        assert not (s.commercial_use and ("NC" in s.licence or "research" in s.licence or "not stated" in s.licence))
    for name in ("multi30k", "masakhaner2", "laroseda", "cifar10", "sst2"):
        assert not sets[name].commercial_use
    assert sets["gsm8k"].commercial_use and sets["digits"].cached and sets["digits"].bytes == 0
    assert sets["fsdd"].files == 3000 and len(sets["udhr"].languages) == 43


def test_every_file_has_a_fixed_address_and_hash():
    for name in data._LOADERS:
        for file in data.data_files(name).values():
            assert len(file.sha256) == 64 and file.bytes > 0 and file.path.startswith(name + "/")
            if name != "cifar10":
                assert file.url.startswith("https://raw.githubusercontent.com/") and any(len(part) == 40 for part in file.url.split("/"))


def test_the_table_holds_the_manifests_files(real_data):
    manifest = json.loads((real_data / "manifest.json").read_text())
    listed = {f["file"]: (f["url"], f["bytes"], f["sha256"]) for entry in manifest.values() for f in entry["files"]}
    ours = {f.path: (f.url, f.bytes, f.sha256) for name in data._LOADERS for f in data.data_files(name).values()}
    assert ours == listed
    for key, entry in manifest.items():
        assert entry["source"].split("/")[1].lower() in data._table("data")[key.split("/")[0]]["source"].lower() + data._table("data")[key.split("/")[0]].get("url", "").lower()


def test_hub_sets_are_pinned_or_say_that_they_are_not():
    sets = data.hub_sets()
    assert {"hub:HuggingFaceH4/ultrachat_200k", "hub:uoft-cs/cifar10", "hub:Salesforce/wikitext"} <= {s.name for s in sets}
    for entry in data._table("hub").values():
        assert entry["revision"] is None or len(entry["revision"]) == 40 and set(entry["revision"]) <= set("0123456789abcdef")
        assert entry["chapters"] and entry["what"]
    assert all(s.source == f"https://huggingface.co/datasets/{s.name[4:]}" and s.chapters for s in sets)


def test_hub_sets_of_all_presets_are_registered(root):
    named = {(path.parent.name + "/" + path.stem, name) for path in (root / "presets").glob("*/*/*.yaml")
             for name in re.findall(r"hub:([\w-]+/[\w.-]+)", path.read_text("utf-8"))}
    assert len(named) > 20
    assert not sorted((chapter, name) for chapter, name in named if chapter not in data._table("hub").get(name, {"chapters": []})["chapters"])


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("KDBOOK_DATA", "~/somewhere")
    assert data.cache_folder() == (tmp_path.home() / "somewhere")
    monkeypatch.delenv("KDBOOK_DATA")
    assert data.cache_folder().name == "kdbook"


# --- the real files ------------------------------------------------------------------------------------------------------------------

ROWS = {"ag_news_test": [7600], "cifar10": [50000, 10000], "digits": [1797], "fsdd": [2700, 300], "gsm8k": [7473, 1319], "laroseda": [15000],
        "multi30k": [29000, 1014, 1000], "ro_sts": [5749, 1500, 1379], "sst2": [6920, 872, 1821], "tiny_shakespeare": [1, 1, 1], "ud_ro_rrt": [752, 729],
        "stsb_multi": [5 * 5749, 5 * 1500, 5 * 1379], "nusax": [12 * 500, 12 * 100, 12 * 400], "udhr": [43 * 31 - 1], "xquad": [12 * 1190]}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_real_sets(name, real_data):
    entry = data._table("data")[name]
    for split, rows in zip(entry["splits"], ROWS[name], strict=True):
        dataset = data.load(name, split)
        assert len(dataset) == rows
        assert list(dataset.column_names) == (list(entry["languages"]) if name == "multi30k" else list(entry["columns"]))


@pytest.mark.parametrize("name, lang, rows", [
    ("ner_transfer", "en", [14041, 3250, 3453]), ("ner_transfer", "de", [12152, 2867, 3005]), ("ner_transfer", "es", [8322, 1914, 1516]),
    ("ner_transfer", "nl", [15806, 2895, 5195]), ("masakhaner2", "swa", [6593, 942, 1883]), ("masakhaner2", "hau", [5716, 816, 1633]),
    ("ud_pud", "de", [1000]), ("ud_pud", "hi", [1000]), ("omw", "nno", [4762]), ("omw", "fra", [102647]), ("xquad", "ro", [1190]),
    ("nusax", "buginese", [500, 100, 400]), ("stsb_multi", "zh", [5749, 1500, 1379]), ("udhr", "amh", [30])])
def test_rows_of_one_language(name, lang, rows, real_data):
    entry = data._table("data")[name]
    for split, count in zip(entry["splits"], rows, strict=True):
        dataset = data.load(name, split, lang=lang)
        assert len(dataset) == count and set(dataset["lang"][:]) == {lang} and list(dataset.column_names) == list(entry["columns"])


def test_several_languages_follow_one_another(real_data):
    both = data.load("stsb_multi", "dev", lang=["fr", "en"])
    assert len(both) == 3000 and both["lang"][:] == ["fr"] * 1500 + ["en"] * 1500
    assert both["score"][:1500] == both["score"][1500:]
    assert data.load("multi30k", "validation", lang=["cs", "en"]).column_names == ["cs", "en"]


def test_xquad_crosses_languages(real_data):
    crossed, german, english = (data.load("xquad", lang=lang, context_lang=other) for lang, other in (("de", "en"), ("de", None), ("en", None)))
    assert crossed["question"][:] == german["question"][:] and crossed["context"][:] == english["context"][:] and crossed["answers"][:] == english["answers"][:]
    assert len(set(english["paragraph"][:])) == 240 and len(set(english["article"][:])) == 48
    row = crossed[700]
    assert row["context"][row["answers"]["answer_start"][0]:].startswith(row["answers"]["text"][0]) and (row["lang"], row["context_lang"]) == ("de", "en")


def test_tags_and_repaired_spanish(real_data):
    spanish = data.load("ner_transfer", "test", lang="es")
    words = {word for row in spanish for word in row["tokens"]}
    assert {"Coruña", "años"} <= words and not any("Ã" in word for word in words)
    assert spanish.features["tags"].feature.names == ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
    names = data.load("masakhaner2", "test", lang="yor").features["tags"].feature.names
    assert names[-2:] == ["B-DATE", "I-DATE"]


def test_gsm8k_splits_rationale_and_result(real_data):
    rows = data.load("gsm8k", "test")
    assert rows[0]["result"] == "18" and rows[0]["rationale"].endswith("farmer’s market.") and not any("<<" in r or "####" in r for r in rows["rationale"])
    assert all(float(result) == float(result) for result in rows["result"])


def test_parallel_sets_are_parallel(real_data):
    trees = data.load("ud_pud", lang=["fr", "hi"])
    assert len(trees) == 2000 and trees["sent_id"][:1000] == trees["sent_id"][1000:]
    for row in trees.select(range(0, 2000, 250)):
        assert len(row["tokens"]) == len(row["lemmas"]) == len(row["upos"]) == len(row["feats"]) == len(row["head"]) == len(row["deprel"])
        assert sum(head == 0 for head in row["head"]) == 1
    nusax = data.load("nusax", "valid")
    assert all(nusax["id"][i:i + 100] == nusax["id"][:100] for i in range(0, 1200, 100)) and nusax["label"][:100] == nusax["label"][100:200]
    sentences = data.load("nusax", "test", task="mt", lang=["toba_batak", "english"])
    assert sentences.column_names == ["toba_batak", "english"] and len(sentences) == 400


def test_tiny_shakespeare_parts_make_the_whole(real_data):
    parts = [data.load("tiny_shakespeare", split)[0]["text"] for split in ("train", "valid", "test")]
    whole = (real_data / "tiny_shakespeare/input.txt").read_text()
    assert "".join(parts) == whole and len(whole) == 1_115_394 and [round(len(p) / len(whole), 3) for p in parts] == [0.9, 0.05, 0.05]


def test_speech(real_data):
    speech = data.load("fsdd", "test")
    assert speech["label"][:] == [d for d in range(10) for _ in range(30)] and len(set(speech["speaker"][:])) == 6 and set(speech["index"][:]) == set(range(5))
    row = speech.with_format("numpy")[0]
    assert row["sampling_rate"] == 8000 and row["array"].dtype == np.float32 and 0.01 < np.abs(row["array"]).max() < 1
    assert speech.features["label"].names[7] == "seven"


def test_images_in_bulk_equal_single_ones(real_data):
    cifar = data.load("cifar10", "test").shuffle(seed=0).select(range(20))
    pixels = data.images(cifar)
    assert pixels.shape == (20, 32, 32, 3) and pixels.dtype == np.uint8
    assert all(np.array_equal(pixels[i], np.asarray(cifar[i]["img"])) for i in range(20))
    assert np.array_equal(data.labels(cifar), cifar["label"][:]) and data.labels(cifar).dtype == np.int64
    assert cifar.features["label"].names[6] == "frog"


def test_images_and_labels_of_other_columns():
    import datasets
    digits = data.load("digits")
    assert data.images(digits).shape == (1797, 8, 8) and data.images(digits).dtype == np.uint8 and data.labels(digits).max() == 9
    assert data.images(digits.select([5, 3]))[1].tolist() == digits[3]["image"]
    for call, column in ((data.images, None), (data.images, "label"), (data.labels, "text")):
        with pytest.raises(ValueError, match="column must be one of"):
            call(datasets.Dataset.from_dict({"text": ["a"], "label": [1]}), *([column] if column else []))
    from PIL import Image
    rows = [Image.fromarray(np.zeros((size, size, 3), np.uint8)) for size in (4, 5)]
    mixed = datasets.Dataset.from_dict({"img": rows}, features=datasets.Features({"img": datasets.Image()}))
    with pytest.raises(ValueError, match="different sizes"):
        data.images(mixed)
    assert data.images(mixed.select([1])).shape == (1, 5, 5, 3)


# --- wrong use -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, message", [
    (lambda: data.load("xqaud"), "nearest: xquad"),
    (lambda: data.load("xquad", lang="ger"), "lang must be one of .*'de'"),
    (lambda: data.load("xquad", lang=[]), "lang must be one or more of"),
    (lambda: data.load("xquad", context_lang="xx"), "context_lang must be one of"),
    (lambda: data.load("sst2", "tset"), "split must be one of 'train', 'valid', 'test', got 'tset' .nearest: test"),
    (lambda: data.load("digits", lang="en"), "lang must be None for digits"),
    (lambda: data.load("nusax", task="qa"), "task must be one of 'sentiment', 'mt'"),
    (lambda: data.load("nusax", tasks="mt"), "nusax has no knob 'tasks' .nearest: task"),
    (lambda: data.get("sst3"), "nearest: sst2"),
    (lambda: data.get("sst2", jobs=0), "jobs must be at least 1, got 0"),
    (lambda: data.verify("mnist"), "name must be one of"),
    (lambda: data.data_files("mnist"), "name must be one of"),
    (lambda: data.load("hub:cifar10"), "hub:OWNER/NAME"),
    (lambda: data.load("hub:a/b", lang="de"), "hub data sets take no lang"),
])
def test_wrong_use_is_told(call, message, cache):
    with pytest.raises(ValueError, match=message):
        call()


# --- offline -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(data._LOADERS.keys() - {"digits"}))
def test_offline_every_loader_says_what_to_do(name, cache, offline):
    with pytest.raises(data.MissingData) as error:
        data.load(name)
    message, file = str(error.value), next(f for f in data.data_files(name).values() if f.path in str(error.value))
    for part in (f"kdbook data get {name}", file.url or "hub", file.sha256, str(cache / file.path), "KDBOOK_DATA", data._size_text(file.bytes)):
        assert part in message
    assert not list(cache.rglob("*.wav")) and not list(cache.rglob("*.lock.lock"))


def test_offline_hub(cache):
    with pytest.raises(data.MissingData) as error:
        data.load("hub:HuggingFaceH4/ultrachat_200k", "train_sft")
    for part in ("https://huggingface.co/datasets/HuggingFaceH4/ultrachat_200k", "8049631c405ae6576f93f445c6b8166f76f5505a", "kdbook data get hub:HuggingFaceH4", "HF_HOME"):
        assert part in str(error.value)
    with pytest.raises(data.MissingData, match="main, not pinned"):
        data.get("hub:SetFit/sst2")


def test_digits_needs_nothing(cache, offline):
    assert len(data.load("digits")) == 1797 and not cache.exists() and data.get("digits") == []


@pytest.mark.parametrize("spec, expected", [
    ("hub:Salesforce/wikitext", ("Salesforce/wikitext", "wikitext-2-raw-v1", "b08601e04326c79dfdd32d625aee71d232d685c3")),
    ("hub:Salesforce/wikitext:wikitext-103-raw-v1", ("Salesforce/wikitext", "wikitext-103-raw-v1", "b08601e04326c79dfdd32d625aee71d232d685c3")),
    ("hub:nyu-mll/glue:sst2@main", ("nyu-mll/glue", "sst2", "main")),
    ("hub:some/thing@v1.0", ("some/thing", None, "v1.0")),
    ("hub:some/thing", ("some/thing", None, None)),
])
def test_hub_configuration_and_revision(spec, expected, monkeypatch):
    import datasets
    seen = []

    def load_dataset(path, config, *, split, revision):
        seen.append((path, config, revision, split))
        return datasets.Dataset.from_dict({"a": [1]})
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(data.load(spec, "validation")) == 1 and seen == [(*expected, "validation")]
    data.load(spec)
    assert seen[1][3] == "train"


def test_hub_sets_that_are_programs_fall_back_to_their_converted_copy(monkeypatch):
    import datasets
    seen = []

    def load_dataset(path, config, *, split, revision):
        seen.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found x.py")
        return datasets.Dataset.from_dict({"a": [1]})
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data.load("hub:some/thing")
    assert seen == [None, "refs/convert/parquet"]


def test_cifar10_comes_from_the_hub_where_its_files_are_missing(cache, monkeypatch):
    import datasets
    seen = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: seen.append((a, k)) or datasets.Dataset.from_dict({"img": [], "label": []}))
    assert data.load("cifar10", "test").column_names == ["img", "label"] and seen[0][0][0] == "uoft-cs/cifar10" and seen[0][1]["split"] == "test"
    assert data.get("cifar10") == [] and len(seen) == 2


# --- trust ---------------------------------------------------------------------------------------------------------------------------

def test_a_wrong_file_is_refused_named_and_left_alone(small_sets, cache, server):
    path = cache / "sst2/train.tsv"
    data.get("sst2", progress=False)
    good = path.read_bytes()
    assert len(data.load("sst2")) == len(good.split(b"\n"))
    for bad in (good[:-1] + b"9", good[:-5], good + b"\n", b""):
        path.write_bytes(bad)
        with pytest.raises(data.WrongHash, match=r"sst2/train\.tsv is not the file .*kdbook data get sst2"):
            data.load("sst2")
        assert path.read_bytes() == bad
        state = {s.path.name: s.state for s in data.verify("sst2")}
        assert state == {"train.tsv": "wrong hash" if len(bad) == len(good) else "wrong length", "dev.tsv": "ok", "test.tsv": "ok"}
    with pytest.raises(data.WrongHash):
        data.get("sst2")
    path.unlink()
    assert {s.state for s in data.verify()} == {"ok", "missing"}
    assert not {s.name: s for s in data.data_sets()}["sst2"].cached
    data.get("sst2", progress=False)
    assert {s.name: s for s in data.data_sets()}["sst2"].cached


def test_a_file_is_hashed_once_until_it_changes(small_sets, cache, monkeypatch):
    data.get("sst2", progress=False)
    reads = []
    real = hashlib.sha256
    monkeypatch.setattr(data.hashlib, "sha256", lambda *a: reads.append(1) or real(*a))
    data.load("sst2")
    data.load("sst2")
    assert not reads
    os.utime(cache / "sst2/train.tsv", ns=(1, 1))
    data.load("sst2")
    assert len(reads) == 1


# --- downloads -----------------------------------------------------------------------------------------------------------------------

def test_download_writes_the_file_and_nothing_else(server, tmp_path):
    server.files["/a"] = TEXT
    counted = []
    assert data.download(server.url("/a"), tmp_path / "x" / "a", sha256=sha(TEXT), size=len(TEXT), report=counted.append).read_bytes() == TEXT
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["a"] and sum(counted) == len(TEXT)
    data.download(server.url("/a"), tmp_path / "x" / "a", sha256=sha(TEXT))
    assert len(server.log) == 1


@pytest.mark.parametrize("size", [None, len(TEXT)])
def test_a_part_is_continued(size, server, tmp_path):
    server.files["/a"] = TEXT
    (tmp_path / "a.part").write_bytes(TEXT[:70_000])
    data.download(server.url("/a"), tmp_path / "a", sha256=sha(TEXT), size=size)
    assert (tmp_path / "a").read_bytes() == TEXT and server.log == [("/a", 70_000, len(TEXT) - 70_000)]


@pytest.mark.parametrize("size", [None, len(TEXT)])
def test_a_complete_part_needs_no_byte(size, server, tmp_path):
    server.files["/a"] = TEXT
    (tmp_path / "a.part").write_bytes(TEXT)
    data.download(server.url("/a"), tmp_path / "a", sha256=sha(TEXT), size=size)
    assert (tmp_path / "a").read_bytes() == TEXT and server.log == []


@pytest.mark.parametrize("part", [b"from another version" * 50, TEXT + b"too long", b"x" * len(TEXT)])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_that_does_not_fit_is_thrown_away(part, ranges, server, tmp_path):
    server.files["/a"], server.ranges = TEXT, ranges
    (tmp_path / "a.part").write_bytes(part)
    data.download(server.url("/a"), tmp_path / "a", sha256=sha(TEXT), size=len(TEXT))
    assert (tmp_path / "a").read_bytes() == TEXT and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_server_without_ranges_sends_everything_again(server, tmp_path):
    server.files["/a"], server.ranges = TEXT, False
    (tmp_path / "a.part").write_bytes(TEXT[:70_000])
    data.download(server.url("/a"), tmp_path / "a", sha256=sha(TEXT), size=len(TEXT))
    assert (tmp_path / "a").read_bytes() == TEXT and server.log == [("/a", 0, len(TEXT))]


def test_a_broken_line_is_tried_again_and_kept(server, tmp_path):
    import requests
    server.files["/a"], server.breaks = TEXT, 2
    data.download(server.url("/a"), tmp_path / "a", sha256=sha(TEXT), size=len(TEXT))
    assert [start > 0 for _, start, _ in server.log] == [False, True, True]
    server.breaks = 3
    with pytest.raises(requests.RequestException):
        data.download(server.url("/a"), tmp_path / "b", sha256=sha(TEXT), size=len(TEXT))
    kept = (tmp_path / "b.part").stat().st_size
    assert 0.8 * len(TEXT) < kept < len(TEXT) and not (tmp_path / "b").exists()
    data.download(server.url("/a"), tmp_path / "b", sha256=sha(TEXT), size=len(TEXT))
    assert server.log[-1][1] == kept and (tmp_path / "b").read_bytes() == TEXT


def test_wrong_content_from_the_server_is_refused_and_not_kept(server, tmp_path):
    server.files["/a"] = TEXT[:-1] + b"!"
    with pytest.raises(data.WrongHash, match=r"/a does not have the content .*SHA-256"):
        data.download(server.url("/a"), tmp_path / "a", sha256=sha(TEXT), size=len(TEXT))
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.part").exists()


def test_a_missing_page_is_told(small_sets, cache, server):
    del server.files["/sst2/dev.tsv"]
    with pytest.raises(data.MissingData, match=r"sst2/dev\.tsv is not in .*404"):
        data.load("sst2", "valid")


def test_get_and_load_through_the_server(small_sets, cache, server, capsys):
    paths = data.get("sst2", progress=False, jobs=3)
    assert [p.read_bytes() for p in paths] == list(small_sets["sst2"].values()) and len(server.log) == 3
    assert "Commercial use is not granted" in capsys.readouterr().err
    data.get("sst2", progress=False)
    assert len(server.log) == 3 and capsys.readouterr().err == ""
    assert data.load("tiny_shakespeare", "valid")[0]["text"] in small_sets["tiny_shakespeare"]["input.txt"].decode()
    assert capsys.readouterr().err.count("Commercial") == 0 and len(server.log) == 4
    assert sorted(p.name for p in cache.rglob("*") if p.is_file()) == ["dev.tsv", "input.txt", "test.tsv", "train.tsv"]


def test_progress_goes_to_the_error_stream(small_sets, cache, capsys):
    data.get("tiny_shakespeare", progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "tiny_shakespeare" in captured.err


CHILD = "import sys; from kdbook import data; data.download(sys.argv[1], sys.argv[2], sha256=sys.argv[3]); print(open(sys.argv[2], 'rb').read() == open(sys.argv[4], 'rb').read())"


def child(server, tmp_path, **options):
    (tmp_path / "wanted").write_bytes(TEXT)
    return subprocess.Popen([sys.executable, "-c", CHILD, server.url("/a"), str(tmp_path / "a"), sha(TEXT), str(tmp_path / "wanted")],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_two_processes_at_once_download_once(server, tmp_path):
    server.files["/a"], server.slow = TEXT, 0.1
    processes = [child(server, tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [out.strip() for out, _ in outputs] == ["True", "True"], outputs
    assert len(server.log) == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["a", "wanted"]


def test_a_killed_process_leaves_a_part_that_is_continued(server, tmp_path):
    server.files["/a"], server.slow = TEXT, 0.2
    process = child(server, tmp_path)
    deadline = time.monotonic() + 30
    while not ((tmp_path / "a.part").exists() and (tmp_path / "a.part").stat().st_size > 20_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not (tmp_path / "a").exists()
    kept, server.slow = (tmp_path / "a.part").stat().st_size, 0
    data.download(server.url("/a"), tmp_path / "a", sha256=sha(TEXT), size=len(TEXT))
    assert (tmp_path / "a").read_bytes() == TEXT and server.log[-1][1] == kept > 0


def test_read_only_cache(small_sets, monkeypatch):
    if not hasattr(os, "seteuid"):
        pytest.skip("no users on this system")
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        monkeypatch.setenv("KDBOOK_DATA", str(cache))
        data.get("sst2", progress=False)
        (cache / "sst2/test.tsv").unlink()
        Path(folder).chmod(0o755)
        (cache / "sst2").chmod(0o555)
        cache.chmod(0o555)
        was_root = os.geteuid() == 0
        if was_root:
            os.seteuid(65534)  # permissions do not count for root
        try:
            before = sorted(cache.rglob("*"))
            assert len(data.load("sst2", "valid")) == len(small_sets["sst2"]["dev.tsv"].split(b"\n"))
            for name, file in (("sst2", "test.tsv"), ("tiny_shakespeare", "input.txt")):
                with pytest.raises(data.MissingData, match=rf"{name}/{file} is not in .*PermissionError.*KDBOOK_DATA"):
                    data.load(name, "test")
            assert sorted(cache.rglob("*")) == before and len(before) == 3
        finally:
            if was_root:
                os.seteuid(0)
            cache.chmod(0o755)
            (cache / "sst2").chmod(0o755)


# --- provenance ----------------------------------------------------------------------------------------------------------------------

def test_a_notebook_learns_which_files_were_used(real_data, monkeypatch):
    import IPython
    import IPython.display
    shown = []
    monkeypatch.setattr(IPython.display, "publish_display_data", shown.append)
    data.load("sst2", "dev")
    assert shown == []
    monkeypatch.setattr(IPython, "get_ipython", lambda: type("Shell", (), {"kernel": object()})())
    data.load("sst2", "dev")
    data.load("xquad", lang=["de", "en"])
    first, second = (bundle["application/vnd.kdbook.data+json"] for bundle in shown)
    assert first == {"name": "sst2", "files": {"sst2/dev.tsv": data.data_files("sst2")["dev.tsv"].sha256}} and shown[0]["text/plain"] == ""
    assert second["files"].keys() == {"xquad/xquad.de.json", "xquad/xquad.en.json"}


def test_a_broken_file_with_the_right_hash_names_its_line(cache, monkeypatch):
    """The parsers speak up even where the table itself is wrong."""
    content = b"fine\t1\nno label\n"
    real = data._table("data")
    entry = real["sst2"] | {"files": {"dev.tsv": [len(content), sha(content)]}}
    monkeypatch.setattr(data, "_table", {"data": {"sst2": entry}}.__getitem__)
    (cache / "sst2").mkdir(parents=True)
    (cache / "sst2/dev.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=r"dev\.tsv, line 2: expected 2 fields"):
        data.load("sst2", "valid")
