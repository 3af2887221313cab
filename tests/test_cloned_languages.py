"""Cloned languages: the clone, the mixture, the ruler of data, and the two similarities."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from conftest import golden
from kdbook.multilingual.cloned_languages import (LanguageSchedule, PowerLaw, clone_tokens, gradient_similarity, hidden_similarity, sample_languages)


def test_golden(shared):
    golden(shared, "multilingual/cloned_languages")


rows = st.lists(st.lists(st.integers(0, 8), min_size=4, max_size=4), min_size=1, max_size=5)


@given(rows, st.integers(0, 3), st.lists(st.booleans(), min_size=9, max_size=9))
def test_a_clone_token_by_token(texts, language, cloned):
    tokens, lang, flags = torch.tensor(texts), torch.full((len(texts),), language), torch.tensor(cloned)
    for is_cloned in (None, flags):
        expected = [[t + language * 9 if t > 0 and (is_cloned is None or cloned[t]) else t for t in row] for row in texts]
        found = clone_tokens(tokens, lang, 9, is_cloned)
        assert found.tolist() == expected and found.dtype == torch.int64
    assert torch.equal(clone_tokens(tokens, lang * 0, 9), tokens)
    assert not (clone_tokens(tokens, lang, 9) % 9 == 0).logical_and(clone_tokens(tokens, lang, 9) > 0).any(), "padding never moves"


def test_errors_of_the_clone():
    tokens, lang = torch.tensor([[1, 2]]), torch.tensor([1])
    for bad in (torch.tensor([[1, 9]]), torch.tensor([[-1, 2]])):
        with pytest.raises(ValueError, match="tokens must be between 0 and 8"):
            clone_tokens(bad, lang, 9)
    with pytest.raises(ValueError, match="lang must be >= 0, got -1"):
        clone_tokens(tokens, torch.tensor([-1]), 9)
    with pytest.raises(ValueError, match="tokens must be"):
        clone_tokens(tokens, torch.tensor([1, 1]), 9)
    with pytest.raises(ValueError, match="is_cloned must have shape"):
        clone_tokens(tokens, lang, 9, torch.ones(8, dtype=torch.bool))
    assert clone_tokens(torch.empty(0, 3, dtype=torch.int64), torch.empty(0, dtype=torch.int64), 9).shape == (0, 3)


@pytest.mark.parametrize("p_clone, languages", [(0.0, 1), (0.3, 2), (0.9, 10), (1.0, 3)])
def test_languages_have_their_shares(p_clone, languages):
    drawn = sample_languages(50_000, p_clone, languages, torch.Generator().manual_seed(1))
    assert drawn.dtype == torch.int64 and drawn.shape == (50_000,)
    shares = torch.bincount(drawn, minlength=languages) / 50_000
    assert abs(shares[0] - (1 - p_clone)) < 0.01
    if languages > 1:
        assert torch.allclose(shares[1:], torch.full((languages - 1,), p_clone / (languages - 1)), atol=0.01)
    assert torch.equal(drawn, sample_languages(50_000, p_clone, languages, torch.Generator().manual_seed(1)))


def test_errors_of_the_mixture():
    for arguments, name in (((4, 1.1, 2), "p_clone"), ((4, -0.1, 2), "p_clone"), ((4, 0.5, 1), "n_languages"), ((4, 0.0, 0), "n_languages"), ((-1, 0.5, 2), "batch_size")):
        with pytest.raises(ValueError, match=name):
            sample_languages(*arguments)
    assert sample_languages(0, 0.5, 2).shape == (0,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(0, 30))
def test_stages_have_equal_lengths_and_the_last_keeps_the_rest(values, more):
    total = len(values) + more
    schedule, length = LanguageSchedule(values, total), total // len(values)
    seen = [schedule.p()] + [schedule.step() for _ in range(total + 2)]
    assert seen == [values[min(step // length, len(values) - 1)] for step in range(total + 3)]


def test_errors_of_the_schedule():
    for values, steps, text in (([], 5, "at least one value"), ([0.5, 1.2], 5, r"values in \[0, 1\]"), ([0.1, 0.9], 1, "at least the 2 stages, got 1")):
        with pytest.raises(ValueError, match=text):
            LanguageSchedule(values, steps)


def test_the_ruler_finds_a_law_and_inverts_it():
    u = np.array([0.1, 0.3, 0.5, 1.0, 2.0])
    law = PowerLaw(u, 1 / (0.05 - 0.01 * u ** -0.4))
    assert np.allclose([law.a, law.b, law.c], [0.01, 0.4, 0.05], rtol=1e-4)
    assert torch.allclose(law.fraction(law.ppl(u)), torch.tensor(u), rtol=1e-6) and law.ppl(u).dtype == torch.float64
    assert law.ppl(0.3).shape == () and math.isclose(law.token_efficiency(law.ppl(0.5), 0.1).item(), 5, rel_tol=1e-6)
    assert torch.isinf(law.fraction(1 / law.c)) and torch.isinf(law.fraction(1.0)), "no amount of data reaches the limit"
    same = PowerLaw(u, 1 / (0.05 - 0.01 * u ** -0.4))
    assert (same.a, same.b, same.c) == (law.a, law.b, law.c)


def test_errors_of_the_ruler():
    for fractions, ppl in (([0.1, 1.0], [5, 4]), ([0.1, 0.5, 1.0], [5, 4]), ([0.0, 0.5, 1.0], [5, 4, 3]), ([0.1, 0.5, 1.0], [5, math.inf, 3])):
        with pytest.raises(ValueError, match="fractions|ppl"):
            PowerLaw(fractions, ppl)
    law = PowerLaw([0.25, 0.5, 1.0], [30, 25, 20])
    for call, name in ((lambda: law.ppl(0), "fraction"), (lambda: law.fraction(-1.0), "ppl"), (lambda: law.token_efficiency(25.0, 0.0), "share")):
        with pytest.raises(ValueError, match=name):
            call()


def test_hidden_states():
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(3, 2, 4, 5, generator=generator), torch.randn(3, 2, 4, 5, generator=generator)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    expected = torch.cosine_similarity(one, two, dim=-1)
    assert torch.allclose(hidden_similarity(one, two), expected.mean((1, 2)), atol=1e-6)
    assert torch.allclose(hidden_similarity(one, two, mask), expected[:, mask].mean(1), atol=1e-6)
    assert torch.allclose(hidden_similarity(one, 3 * one), torch.ones(3))
    broken = two.clone()
    broken[:, ~mask] = torch.nan
    assert torch.allclose(hidden_similarity(one, broken, mask), expected[:, mask].mean(1), atol=1e-6), "masked positions may hold anything"
    for a, b, m in ((one, two[:2], None), (one[0], two[0], None), (one, two, mask[:1]), (one, two, mask & False), (one[:, :0], two[:, :0], None)):
        with pytest.raises(ValueError, match="hidden_1|mask"):
            hidden_similarity(a, b, m)


def test_gradients():
    one = {"w": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "b": torch.tensor([1.0, 2.0])}
    two = {"w": torch.tensor([[1.0, 0.0], [0.0, -1.0]]), "b": torch.tensor([2.0, 4.0])}
    assert gradient_similarity(one, two) == pytest.approx({"w": 0.0, "b": 1.0})
    assert gradient_similarity(one, {name: 0 * g for name, g in two.items()}) == {"w": 0.0, "b": 0.0}
    with pytest.raises(ValueError, match="same names, got a difference in b"):
        gradient_similarity(one, {"w": two["w"]})
    with pytest.raises(ValueError, match="w must have the same shape"):
        gradient_similarity({"w": torch.ones(4)}, {"w": torch.ones(2, 2)})
