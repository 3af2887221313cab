"""The benchmarks run and say what they measure; no number of theirs is asserted."""
import pytest

from kdbook.book.bench import as_script, bench_fit, in_turns, main


def test_in_turns_warms_up_and_alternates():
    calls = []
    seconds = in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b", "a", "b", "a", "b"] and {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_fit_against_the_loop():
    rows = bench_fit(steps=2, rounds=1)
    assert len(rows) == 3 and all(row["ratio"] == pytest.approx(row["fit"] / row["by hand"]) and row["fit"] > 0 for row in rows)


def test_a_chapter_as_a_script():
    script = as_script("llm/taid", {"steps": 3})
    compile(script, "taid", "exec")
    assert script.index("steps: int = 1000") < script.index("steps = 3") < script.index("def taid_loss")


def test_wrong_words(capsys):
    assert main(["speed"]) == main([]) == 2
    assert "fit|run" in capsys.readouterr().err
