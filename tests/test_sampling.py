import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbook.sampling import largest_remainder, power_probabilities

counts = st.lists(st.integers(0, 10**9), min_size=1, max_size=12).filter(any)


@settings(max_examples=100, deadline=None)
@given(counts, st.floats(0, 3))
def test_power_probabilities(values, alpha):
    q = power_probabilities(values, alpha)
    assert q.dtype == torch.float64 and q.sum().item() == pytest.approx(1) and (q >= 0).all()
    assert ((q > 0) <= (torch.tensor(values) > 0)).all()
    order = torch.tensor(values).argsort()
    assert (q[order].diff() >= -1e-12).all()  # more data never means fewer draws
    assert torch.allclose(q, power_probabilities(torch.tensor(values) * 3, alpha), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(counts)
def test_ends_of_the_exponent(values):
    tensor = torch.tensor(values, dtype=torch.float64)
    assert torch.allclose(power_probabilities(values), tensor / tensor.sum())
    assert torch.allclose(power_probabilities(values, 0), (tensor > 0).double() / (tensor > 0).sum())


def test_power_probabilities_do_not_underflow():
    assert power_probabilities([1e-300, 1e-300, 0], 3).tolist() == [0.5, 0.5, 0]
    assert power_probabilities([1e300, 1e300], 2).tolist() == [0.5, 0.5]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=12).filter(any), st.integers(0, 10_000))
def test_largest_remainder_adds_up_and_rounds_down_or_up(weights, total):
    result = largest_remainder(weights, total)
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights) * total
    assert result.dtype == torch.int64 and result.sum() == total
    assert ((result - shares).abs() < 1 + 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 100))
def test_largest_remainder_of_equal_weights_gives_the_rest_to_the_first(k, total):
    for weights in ([1 / 3] * k, torch.full((k,), 0.1)):
        result = largest_remainder(weights, total).tolist()
        assert result == [total // k + (i < total % k) for i in range(k)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(any), st.integers(1, 5))
def test_largest_remainder_keeps_whole_shares_also_in_float32(values, factor):
    total = sum(values) * factor
    expected = [v * factor for v in values]
    assert largest_remainder(values, total).tolist() == expected
    assert largest_remainder(torch.tensor(values, dtype=torch.float32) / sum(values), total).tolist() == expected


def test_ties_are_not_decided_by_rounding_errors():
    # 2.5 and 2.5 on paper; the second is larger by rounding
    assert largest_remainder([2.0, 2.5, 2.5 + 1e-15], 7).tolist() == [2, 3, 2]
    assert largest_remainder(torch.tensor([0.1, 0.1, 0.8]), 5).tolist() == [1, 0, 4]


def test_golden_numbers(shared):
    functions = {
        ("llm/ddk", "allocate_samples"): lambda f, n: largest_remainder(torch.tensor(f["tensor"]), n),
        ("multilingual/gnmt", "sampling_probs"): lambda n, oversample=False: power_probabilities(n, 0.0 if oversample else 1.0).float(),
        ("multilingual/xglm", "language_sampling_probs"): lambda n, alpha=0.3: power_probabilities(n, alpha).float(),
        ("multilingual/bloomz", "capped_mixture"): lambda n, cap: power_probabilities(torch.tensor(n).clamp(max=cap)).float(),
    }
    seen = set()
    for (file, name), f in functions.items():
        for case in json.loads((shared / f"golden/{file}.json").read_text())["cases"]:
            if case["call"].endswith("." + name):
                want = case["expect"]
                got = f(*case["args"], **case["kwargs"])
                assert torch.allclose(got, torch.tensor(want["tensor"], dtype=getattr(torch, want["dtype"])), rtol=1e-5, atol=1e-6)
                seen.add(name)
    assert len(seen) == 4


@pytest.mark.parametrize("call, words", [
    (lambda: power_probabilities([[1, 2]]), r"counts must be \(K,\)"),
    (lambda: power_probabilities([1, -2]), "counts must be >= 0"),
    (lambda: power_probabilities([1, float("nan")]), "counts must be >= 0"),
    (lambda: power_probabilities([1, float("inf")]), "finite"),
    (lambda: power_probabilities([0, 0]), "counts must not all be 0"),
    (lambda: power_probabilities([]), "counts must not all be 0"),
    (lambda: power_probabilities([1, 2], -1), "alpha must be >= 0 and finite, got -1"),
    (lambda: power_probabilities([1, 2], float("nan")), "alpha must be"),
    (lambda: largest_remainder([[1.0]], 2), r"weights must be \(K,\)"),
    (lambda: largest_remainder([1.0, -1.0], 2), "weights must be >= 0"),
    (lambda: largest_remainder([0.0], 2), "weights must not all be 0"),
    (lambda: largest_remainder([1.0], -1), "total must be >= 0, got -1"),
])
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
