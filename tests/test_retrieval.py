import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbook.losses import similarity
from kdbook.retrieval import class_means, hit_rate, mean_reciprocal_rank, ranks, reciprocal_rank, top_k

seeds = st.integers(0, 10_000)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def few_values(*shape, seed=0):
    """Scores with many ties, some of them -inf."""
    values = torch.randint(-1, 3, shape, generator=generator(seed)).float()
    return values.masked_fill(values < 0, float("-inf"))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 4), st.integers(1, 9), st.integers(1, 9), st.booleans(), seeds)
def test_top_k_is_the_stable_sort(rows, size, k, ties, seed):
    scores = (few_values if ties else normal)(rows, size, seed=seed)
    k = min(k, size)
    values, indices = top_k(scores, k)
    for row in range(rows):
        order = sorted(range(size), key=lambda i: (-scores[row, i].item(), i))
        assert indices[row].tolist() == order[:k]
    assert torch.equal(values, scores.gather(-1, indices)) and indices.dtype == torch.int64


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), st.integers(2, 8), st.integers(1, 8), seeds)
def test_top_k_never_returns_what_is_excluded(rows, size, k, seed):
    scores, k = few_values(rows, size, seed=seed), min(k, size - 1)
    exclude = torch.randint(-1, size, (rows,), generator=generator(seed))
    indices = top_k(scores, k, exclude=exclude)[1]
    for row in range(rows):
        order = [i for i in sorted(range(size), key=lambda i: (-scores[row, i].item(), i)) if i != exclude[row]]
        assert indices[row].tolist() == order[:k]


def test_top_k_of_a_vector_of_integers_and_of_more_dimensions():
    assert top_k(torch.tensor([3, 1, 3]), 2)[1].tolist() == [0, 2]
    assert top_k(torch.tensor([3, 1, 3]), 2, exclude=torch.tensor(0))[1].tolist() == [2, 1]
    scores = normal(2, 3, 5)
    assert torch.equal(top_k(scores, 2)[1], scores.topk(2).indices)
    assert top_k(scores, 5, exclude=torch.full((2, 3), -1))[1].shape == (2, 3, 5)


def test_top_k_has_gradients():
    scores = normal(2, 4).requires_grad_()
    top_k(scores, 2)[0].sum().backward()
    assert scores.grad.sum() == 4 and set(scores.grad.unique().tolist()) == {0.0, 1.0}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(1, 8), seeds)
def test_ranks_by_their_definition(rows, size, seed):
    scores = few_values(rows, size, seed=seed)
    targets = torch.randint(size, (rows,), generator=generator(seed))
    best, index = ranks(scores, targets), ranks(scores, targets, ties="index")
    for row in range(rows):
        own, target = scores[row, targets[row]], int(targets[row])
        assert best[row] == 1 + sum(s > own for s in scores[row])
        assert index[row] == 1 + sum(s > own or (s == own and i < target) for i, s in enumerate(scores[row]))
    assert (best <= index).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 8), seeds)
def test_index_ranks_agree_with_top_k(rows, size, seed):
    scores = few_values(rows, size, seed=seed)
    targets = torch.randint(size, (rows,), generator=generator(seed))
    places = (top_k(scores, size)[1] == targets[:, None]).int().argmax(1) + 1
    assert torch.equal(ranks(scores, targets, ties="index"), places)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 30))
def test_figures_are_means_over_ranks(values, k):
    assert hit_rate(torch.tensor(values), k) == pytest.approx(sum(v <= k for v in values) / len(values))
    mean = mean_reciprocal_rank(values)
    assert mean == pytest.approx(sum(1 / v for v in values) / len(values))
    lists = [[0] * (v - 1) + [1, 1] for v in values]
    assert sum(reciprocal_rank(one, 40) for one in lists) / len(lists) == pytest.approx(mean)


def test_reciprocal_rank_edges():
    assert reciprocal_rank([], 3) == 0.0 and reciprocal_rank([0, 0], 3) == 0.0
    assert reciprocal_rank(torch.tensor([0, 1]), 1) == 0.0 and reciprocal_rank([True], 1) == 1.0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 8), st.integers(1, 4), st.booleans(), seeds)
def test_class_means_by_their_definition(n, classes, normalize, seed):
    features = normal(n, 3, seed=seed)
    labels = torch.randint(-1, classes, (n,), generator=generator(seed))
    labels[labels == -1] = -100
    means, counts = class_means(features, labels, classes, normalize=normalize)
    assert means.shape == (classes, 3) and counts.dtype == torch.int64
    for c in range(classes):
        own = features[labels == c]
        assert counts[c] == len(own)
        if not len(own):
            assert torch.equal(means[c], torch.zeros(3))
        elif normalize:
            mean = (own / own.norm(dim=1, keepdim=True)).mean(0)
            assert torch.allclose(means[c], mean / mean.norm(), atol=1e-5)
        else:
            assert torch.allclose(means[c], own.mean(0), atol=1e-6)


def test_class_means_of_tokens_nan_padding_half_and_gradients():
    features, labels = normal(2, 3, 4), torch.tensor([[0, 1, -100], [1, -100, -100]])
    features[labels == -100] = float("nan")
    means, counts = class_means(features.requires_grad_(), labels, 2)
    assert means.isfinite().all() and counts.tolist() == [1, 2]
    means.sum().backward()
    assert features.grad[0, 1, 0] == 0.5 and features.grad[labels == -100].abs().sum() == 0
    assert class_means(features.detach().half(), labels, 2)[0].dtype == torch.float32
    assert class_means(features.detach().double(), labels, 2)[0].dtype == torch.float64


def test_golden_numbers(shared):
    def decode(value):
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"])) if isinstance(value, dict) else value

    def overlap(a, b, k=5):
        everyone = torch.arange(len(a))
        x, y = (top_k(similarity(f), k, exclude=everyone)[1] for f in (a, b))
        return (x[:, :, None] == y[:, None]).any(-1).float().mean()

    def mined(scores, num_negatives):
        best = top_k(scores[:, 1:], num_negatives)[1] + 1
        return torch.cat([torch.zeros_like(best[:, :1]), best], 1)

    calls = {
        ("multimodal/dcd", "mine_hard_negatives"): mined,
        ("multimodal/dcd", "recall_at_k"): lambda s, t, ks=(1, 5, 10): {f"R@{k}": hit_rate(ranks(s, t), k) for k in ks},
        ("multimodal/vlm_ood", "neighborhood_overlap"): overlap,
        ("selfdistill/modular_encoder", "retrieval_metrics"): lambda s, t: {"mrr": mean_reciprocal_rank(ranks(s, t)), "recall@1": hit_rate(ranks(s, t), 1)},
        ("multilingual/prokd", "class_prototypes"): class_means,
        ("multimodal/mulki", "class_prototypes"): lambda f, y, c: class_means(f, y, c, normalize=True)[0],
        ("multilingual/crosslingual_qa", "average_precision_at_k"): reciprocal_rank,
    }
    seen = set()
    for (file, name), f in calls.items():
        for case in json.loads((shared / f"golden/{file}.json").read_text())["cases"]:
            if case["call"].endswith("." + name):
                got, want = f(*map(decode, case["args"]), **case["kwargs"]), case["expect"]
                if isinstance(want, dict) and "tensor" not in want:
                    assert got == pytest.approx(want)
                else:
                    got, want = (got, want) if isinstance(got, tuple) else ([got], [want])
                    for one, other in zip(got, want):
                        assert torch.allclose(torch.as_tensor(one).double(), torch.as_tensor(decode(other)).double(), rtol=1e-5, atol=1e-6)
                seen.add(name)
    assert len(seen) == 6


nan = float("nan")


@pytest.mark.parametrize("call, words", [
    (lambda: top_k(torch.tensor(1.0), 1), "got a scalar"),
    (lambda: top_k(torch.zeros(2, 3), 0), "k must be between 1 and the 3"),
    (lambda: top_k(torch.zeros(2, 3), 4), "k must be between 1 and the 3"),
    (lambda: top_k(torch.zeros(2, 3), 3, exclude=torch.tensor([-1, 2])), "k must be between 1 and the 2"),
    (lambda: top_k(torch.zeros(2, 3), 1, exclude=torch.tensor([0])), "exclude must be"),
    (lambda: top_k(torch.zeros(2, 3), 1, exclude=torch.tensor([0, 3])), r"exclude must be in \[-1, 3\)"),
    (lambda: top_k(torch.tensor([[nan, 1.0]]), 1), "nan"),
    (lambda: ranks(torch.tensor([[nan, 1.0]]), torch.tensor([0])), "nan"),
    (lambda: ranks(torch.zeros(2, 3), torch.tensor([0])), "scores and targets"),
    (lambda: ranks(torch.zeros(2, 3), torch.tensor([0, 3])), r"targets must be in \[0, 3\)"),
    (lambda: ranks(torch.zeros(1, 3), torch.tensor([-1])), "targets must be"),
    (lambda: ranks(torch.zeros(1, 3), torch.tensor([0]), ties="worst"), "ties must be"),
    (lambda: hit_rate(torch.tensor([1]), 0), "k must be at least 1"),
    (lambda: hit_rate(torch.tensor([]), 1), "at least one rank"),
    (lambda: mean_reciprocal_rank(torch.tensor([0])), "count from 1"),
    (lambda: reciprocal_rank([1], 0), "k must be at least 1"),
    (lambda: class_means(torch.zeros(2, 3), torch.tensor([0, 2]), 2), r"labels must be -100 or in \[0, 2\)"),
    (lambda: class_means(torch.zeros(2, 3), torch.tensor([0, -1]), 2), "labels must be"),
    (lambda: class_means(torch.zeros(2, 3), torch.tensor([0]), 2), "features and labels"),
    (lambda: class_means(torch.zeros(2, 3), torch.tensor([0, 0]), 0), "num_classes"),
])
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
