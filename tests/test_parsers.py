"""The parsers promise: a file is read whole, or a ValueError names file and line. Broken files of every kind try to break that."""
import gzip
import io
import json
import re
import wave

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdbook import parsers

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def squad() -> bytes:
    context = "Le Rhône est un fleuve. Il traverse Genève et Lyon."
    questions = [{"id": f"q{i}", "question": f"Où, {i} ?", "answers": [{"text": word, "answer_start": context.index(word)}]}
                 for i, word in enumerate(("Rhône", "Genève", "Lyon"))]
    article = {"title": "Rhône", "paragraphs": [{"context": context, "qas": questions}]}
    return json.dumps({"data": [article, article], "version": "1.1"}, ensure_ascii=False, indent=1).encode()


def conllu() -> bytes:
    sentence = ("# sent_id = {0}\n# text = Zum Café.\n1-2\tZum\t_\t_\t_\t_\t_\t_\t_\t_\n1\tzu\tzu\tADP\t_\t_\t3\tcase\t_\t_\n2\tdem\tder\tDET\t_\tCase=Dat|Number=Sing\t3\tdet\t_\t_\n"
                "3\tCafé\tCafé\tNOUN\t_\t_\t0\troot\t_\tSpaceAfter=No\n4\t.\t.\tPUNCT\t_\t_\t3\tpunct\t_\t_\n\n")
    return "".join(sentence.format(i) for i in range(3)).encode()


def udhr() -> bytes:
    articles = "".join(f'<article number="{i}">\n <title>Artículo {i}</title>\n <para>Todo niño {i}.</para>\n</article>\n' for i in (1, 2, 3))
    return ('<?xml version="1.0" encoding="UTF-8"?>\n<udhr iso639-3="spa" key="spa" n="Español" dir="ltr" iso15924="Latn" xmlns="http://efele.net/udhr">\n'
            f"<title>Declaración</title>\n<preamble><title>Preámbulo</title><para>Considerando</para></preamble>\n{articles}</udhr>\n").encode()


def wav(samples=None) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes((np.arange(-60, 60) if samples is None else samples).astype("<i2").tobytes())
    return file.getvalue()


# name -> (reader of a path, file name, content of a correct file)
FORMATS = {
    "lines": (parsers.read_lines, "a.txt", "ein Hündchen\nzwei Hündchen\n\nvier\n".encode()),
    "gzip": (parsers.read_lines, "a.txt.gz", gzip.compress("ein Hündchen\nzwei\ndrei\n".encode() * 5, mtime=0)),
    "csv": (lambda p: parsers.read_table(p, ("sentence1", "sentence2", "score"), convert={"score": parsers.number(0, 5)}), "a.csv",
            'Ein Mann tanzt.,"Ein Mann, der ""tanzt"".",5.0\r\nGrüße,"zwei\nZeilen",4.75\r\nc,d,0\r\n'.encode()),
    "csv with header": (lambda p: parsers.read_table(p, ("id", "text", "label"), header=True, convert={"id": int, "label": parsers.choice("no", "yes")}), "a.csv",
                        "id,text,label\n1,café,yes\n2,\"thé, noir\",no\n".encode()),
    "tsv": (lambda p: parsers.read_table(p, ("sentence", "label"), delimiter="\t", quoted=False, line_end=False, convert={"label": parsers.choice("0", "1")}),
            "a.tsv", 'a naïve "comedy\t0\nfine\t1\n`` good \'\'\t1'.encode()),
    "jsonl": (lambda p: parsers.read_jsonl(p, ("question", "answer")), "a.jsonl",
              "".join(json.dumps({"question": f"Wie viele? {i} ü", "answer": f"#### {i}"}, ensure_ascii=False) + "\n" for i in range(4)).encode()),
    "squad": (parsers.read_squad, "a.json", squad()),
    "reviews": (parsers.read_reviews, "r.json", json.dumps({"reviews": [{"index": str(i), "title": "În", "content": f"produs în {i}", "starRating": "5"} for i in range(3)]},
                                                           ensure_ascii=False, indent=1).encode()),
    "conll": (lambda p: parsers.read_conll(p, TAGS), "a.conll", "Zoë B-PER\nSmith I-PER\nwent O\n\nTo O\nKöln B-LOC\n\n".encode()),
    "conllu": (parsers.read_conllu, "a.conllu", conllu()),
    "udhr": (lambda p: parsers.read_udhr(p)[1], "udhr_spa.xml", udhr()),
    "omw": (lambda p: parsers.read_omw(p)[1], "wn-data-fra.tab",
            "# WOLF\tfra\thttp://x.org\tCeCILL-C\n00001740-n\tfra:lemma\tentité\n00001740-n\tfra:def\t0\tce qui est\n02084071-n\tlemma\tchien\n".encode()),
    "wav": (parsers.read_wav, "a.wav", wav()),
}
names = pytest.mark.parametrize("name", FORMATS)


def columns(result) -> dict[str, list]:
    """Any reader's result as a dict of lists, so that prefixes can be compared."""
    if isinstance(result, dict):
        return result
    if isinstance(result, tuple):
        return {"samples": result[0].tolist()}
    return {"lines": result}


def read(name: str, folder, data: bytes):
    """The columns, or None where the file was refused in the promised way; any other exception escapes."""
    reader, file, _ = FORMATS[name]
    path = folder / file
    path.write_bytes(data)
    try:
        return columns(reader(path))
    except ValueError as error:
        match = re.match(re.escape(str(path)) + r", line (\d+): .", str(error))
        assert match and 1 <= int(match[1]) <= data.count(b"\n") + 60, f"does not name file and line: {error}"
        return None


fuzz = settings(deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@names
def test_a_correct_file_is_read(name, tmp_path):
    result = read(name, tmp_path, FORMATS[name][2])
    assert result and all(len(values) == len(next(iter(result.values()))) > 1 for values in result.values())


@names
def test_cut_off_anywhere_it_is_refused_or_a_true_prefix(name, tmp_path):
    data = FORMATS[name][2]
    whole = read(name, tmp_path, data)
    for cut in range(len(data)):
        part = read(name, tmp_path, data[:cut])
        if part is not None:
            for column, values in part.items():
                assert values == whole[column][:len(values)], (cut, column)


@names
def test_empty_file_is_refused(name, tmp_path):
    assert read(name, tmp_path, b"") is None


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "wav"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-32"])
def test_wrong_encoding_is_refused(name, encoding, tmp_path):
    data = FORMATS[name][2]
    recoded = (gzip.decompress(data) if name == "gzip" else data).decode().encode(encoding)
    assert read(name, tmp_path, gzip.compress(recoded) if name == "gzip" else recoded) is None


@names
@fuzz
@given(edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255), st.sampled_from(["set", "insert", "delete"])), min_size=1, max_size=4))
def test_flipped_bytes_never_raise_anything_else(name, edits, tmp_path):
    data = bytearray(FORMATS[name][2])
    for position, value, what in edits:
        position %= len(data)
        if what == "set":
            data[position] = value
        elif what == "insert":
            data.insert(position, value)
        else:
            del data[position]
    read(name, tmp_path, bytes(data))


@names
@fuzz
@given(data=st.binary(max_size=200))
def test_any_bytes_never_raise_anything_else(name, data, tmp_path):
    read(name, tmp_path, data)


@names
@fuzz
@given(text=st.text(alphabet=st.sampled_from('ab\t\n", {}[]:<>/#=0159-é\r\x85\u2028'), max_size=80))
def test_structured_rubbish_never_raises_anything_else(name, text, tmp_path):
    read(name, tmp_path, text.encode())


@fuzz
@given(rows=st.lists(st.tuples(st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=12), st.floats(0, 5)), min_size=1, max_size=6))
def test_csv_written_by_csv_is_read_back(rows, tmp_path):
    import csv
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    result = parsers.read_table(tmp_path / "a.csv", ("text", "score"), convert={"score": parsers.number(0, 5)})
    assert list(zip(result["text"], result["score"])) == rows


@fuzz
@given(lines=st.lists(st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\n"), max_size=12), min_size=1, max_size=6), packed=st.booleans())
def test_lines_are_read_back_whatever_they_hold(lines, packed, tmp_path):
    path = tmp_path / ("a.gz" if packed else "a")
    data = ("\n".join(lines) + "\n").encode()
    if data.startswith(b"\xef\xbb\xbf"):
        return  # a byte order mark is no text
    path.write_bytes(gzip.compress(data) if packed else data)
    assert parsers.read_lines(path) == lines


TABLE = dict(columns=("sentence", "label"), delimiter="\t", convert={"label": parsers.choice("0", "1")})


@pytest.mark.parametrize("data, line, problem", [
    ("a\t1\nb\t1\tmore\n", 2, "expected 2 fields"),
    ("1\ta\n", 1, "column label"),
    ("a\t1\n\nb\t1\n", 2, "expected 2 fields"),
    ("a\t1\nb\t2\n", 2, "'2' is none of 0, 1"),
    ('a\t1\n"b\t1\n', 2, "bad quotes"),
    ("a\t1\nb\t1", 2, "no line end"),
])
def test_tables_name_line_and_problem(data, line, problem, tmp_path):
    (tmp_path / "t.tsv").write_text(data)
    with pytest.raises(ValueError, match=rf"t\.tsv, line {line}: .*{problem}"):
        parsers.read_table(tmp_path / "t.tsv", **TABLE)


def test_swapped_columns_under_a_header_are_refused(tmp_path):
    (tmp_path / "t.csv").write_text("text,id\nx,1\n")
    with pytest.raises(ValueError, match="line 1: expected the header id,text, got text,id"):
        parsers.read_table(tmp_path / "t.csv", ("id", "text"), header=True)
    (tmp_path / "t.csv").write_text("id,text\n")
    with pytest.raises(ValueError, match="line 1: no row after the header"):
        parsers.read_table(tmp_path / "t.csv", ("id", "text"), header=True)


@pytest.mark.parametrize("value", ["5.5", "-1", "nan", "four", ""])
def test_numbers_outside_their_range_are_refused(value, tmp_path):
    (tmp_path / "t.csv").write_text(f"a,1\nb,{value}\n")
    with pytest.raises(ValueError, match="line 2: column score"):
        parsers.read_table(tmp_path / "t.csv", ("text", "score"), convert={"score": parsers.number(0, 5)})


@pytest.mark.parametrize("old, new, line, problem", [
    ("\tADP", "\tWORD", 1, "part of speech WORD"),
    ("\t3\tcase", "\t7\tcase", 1, "head 7"),
    ("\t3\tcase", "\t_\tcase", 1, "head None"),
    ("# text = Zum Café.\n", "", 1, "no line '# text"),
    ("4\t.\t.", "5\t.\t.", 1, "not numbered"),
    ("\tdet\t_\t_", "\tdet\t_", 5, "ten columns"),
    ("\n\n", "\n\n\n", 9, "a blank line without a sentence"),
])
def test_conllu_problems(old, new, line, problem, tmp_path):
    (tmp_path / "a.conllu").write_text(conllu().decode().replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"a\.conllu, line {line}: .*{problem}"):
        parsers.read_conllu(tmp_path / "a.conllu")


def test_conllu_leaves_out_ranges_and_empty_nodes(tmp_path):
    text = conllu().decode().replace("4\t.\t.", "3.1\tund\tund\tCCONJ\t_\t_\t_\t_\t0:root\t_\n4\t.\t.", 1)
    (tmp_path / "a.conllu").write_text(text)
    result = parsers.read_conllu(tmp_path / "a.conllu")
    assert result["tokens"][0] == ["zu", "dem", "Café", "."] and result["head"][0] == [3, 3, 0, 3]
    assert result["feats"][0][1] == "Case=Dat|Number=Sing" and result["sent_id"] == ["0", "1", "2"]


@pytest.mark.parametrize("old, new, problem", [
    ('number="2"', 'number="3"', "expected article 2, got number '3'"),
    ("<para>Todo niño 2.</para>", "", "article 2 has no text"),
    ('iso15924="Latn" ', "", "without iso15924"),
    ("udhr ", "other ", "no well-formed XML"),
    ("<udhr ", '<!DOCTYPE udhr [<!ENTITY a "b">]>\n<udhr ', "document type"),
    ('number="1"', 'number="x"', "expected article 1"),
])
def test_udhr_problems(old, new, problem, tmp_path):
    (tmp_path / "u.xml").write_text(udhr().decode().replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"u\.xml, line \d+: .*{problem}"):
        parsers.read_udhr(tmp_path / "u.xml")


def test_udhr_content(tmp_path):
    (tmp_path / "u.xml").write_bytes(udhr())
    attributes, result = parsers.read_udhr(tmp_path / "u.xml")
    assert attributes["n"] == "Español" and result["article"] == [0, 1, 2, 3] and result["text"][2] == "Todo niño 2."


@pytest.mark.parametrize("row", ["00001740-n\tfra:lema\tx", "1740-n\tfra:lemma\tx", "00001740-q\tlemma\tx", "00001740-n\tlemma", "00001740-n\tlemma\t ",
                                 "00001740-n\tlemma\tx\ty", "", "00001740-n\tdef\tx", "00001740-n\tita:lemma\tx"])
def test_omw_rows_are_never_skipped_unless_the_format_says_so(row, tmp_path):
    (tmp_path / "w.tab").write_text(f"# W\tfra\tu\tl\n00001740-n\tlemma\ta\n{row}\n")
    with pytest.raises(ValueError, match=r"w\.tab, line 3"):
        parsers.read_omw(tmp_path / "w.tab")


def test_squad_answer_must_stand_in_its_context(tmp_path):
    (tmp_path / "s.json").write_text(squad().decode().replace('"Lyon"', '"Paris"', 1))
    with pytest.raises(ValueError, match=r"s\.json, line \d+: data\[0\]\.paragraphs\[0\]\.qas\[2\]\.answers\[0\] does not stand at character"):
        parsers.read_squad(tmp_path / "s.json")


def test_squad_names_the_line_of_a_missing_key(tmp_path):
    text = squad().decode().replace('"question": "Où, 1 ?"', '"query": "Où, 1 ?"', 1)
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=r"qas\[1\]\.question: expected str, got NoneType") as error:
        parsers.read_squad(tmp_path / "s.json")
    line = int(re.search(r"line (\d+)", str(error.value))[1])
    assert abs(line - text[:text.index("query")].count("\n") - 1) < 15


@pytest.mark.parametrize("channels, width", [(2, 2), (1, 1)])
def test_wav_of_another_kind_is_refused(channels, width, tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((channels, width, 8000, 0, "NONE", ""))
        file.writeframes(bytes(40))
    with pytest.raises(ValueError, match="expected one channel of 16 bits"):
        parsers.read_wav(tmp_path / "a.wav")


def test_wav_samples(tmp_path):
    samples = np.array([-32768, -1, 0, 1, 32767], "<i2")
    (tmp_path / "a.wav").write_bytes(wav(samples))
    values, rate = parsers.read_wav(tmp_path / "a.wav")
    assert rate == 8000 and values.dtype == np.float32 and np.array_equal(values * 32768, samples)
    (tmp_path / "a.wav").write_bytes(wav(np.zeros(0, "<i2")))
    with pytest.raises(ValueError, match="promises 0 samples"):
        parsers.read_wav(tmp_path / "a.wav")


def test_deeply_nested_json_is_refused(tmp_path):
    assert read("squad", tmp_path, b"[" * 100_000) is None
    assert read("jsonl", tmp_path, b"[" * 100_000) is None


def test_every_real_text_file_passes_its_parser(real_data):
    assert len(parsers.read_lines(real_data / "multi30k/train.cs.gz")) == 29000
    assert len(parsers.read_squad(real_data / "xquad/xquad.zh.json")["id"]) == 1190
    head, rows = parsers.read_omw(real_data / "omw/wn-data-nno.tab")
    assert head["language"] == "nno" and len(rows["lemma"]) == 4762
    assert sum(len(parsers.read_udhr(path)[1]["article"]) >= 30 for path in (real_data / "udhr").glob("*.xml")) == 43
