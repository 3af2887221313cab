"""Trans-Encoder: the contract of its functions, the readers, and the rounds."""
import math

import pytest
import torch
from hypothesis import given, strategies as st
from scipy import stats

from conftest import golden
from kdbook.models import encoder
from kdbook.selfdistill.trans_encoder import (AlignmentCrossEncoder, BiEncoder, JoinedCrossEncoder, bi_encoder_loss, bi_encoder_scores, cross_encoder_loss, joined_pairs,
                                              mutual_pseudo_labels, spearman_rho, symmetric_examples, trans_encoder_cycles)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_golden(shared):
    golden(shared, "selfdistill/trans_encoder")


def test_signatures():
    import inspect
    expected = {bi_encoder_scores: ["embeddings1", "embeddings2"], cross_encoder_loss: ["logits", "soft_labels"],
                bi_encoder_loss: ["embeddings1", "embeddings2", "soft_labels"], mutual_pseudo_labels: ["scores"],
                symmetric_examples: ["first", "second", "soft_labels"], spearman_rho: ["x", "y"]}
    for function, names in expected.items():
        assert list(inspect.signature(function).parameters) == names


@given(st.integers(0, 100), st.floats(0.1, 10))
def test_scores_are_cosines_of_any_scale(seed, factor):
    a, b = draw(5, 7, seed=seed), draw(5, 7, seed=seed + 1)
    scores = bi_encoder_scores(a, b)
    assert torch.allclose(scores, (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)), atol=1e-5) and scores.abs().max() <= 1 + 1e-6
    assert torch.allclose(bi_encoder_scores(factor * a, b), scores, atol=1e-5) and torch.allclose(bi_encoder_scores(b, a), scores)
    assert torch.allclose(bi_encoder_scores(a, a), torch.ones(5)) and torch.equal(bi_encoder_scores(0 * a, b), torch.zeros(5))


@pytest.mark.parametrize("labels", [[0.0, 1.0, 0.3], [-0.4, 1.2, 0.5]])
def test_cross_encoder_loss_against_the_formula(labels):
    logits, labels = torch.tensor([0.3, -2.0, 40.0], requires_grad=True), torch.tensor(labels, requires_grad=True)
    loss = cross_encoder_loss(logits, labels)
    log_p, log_q = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    assert torch.allclose(loss, -(labels * log_p + (1 - labels) * log_q).mean())
    loss.backward()
    assert torch.allclose(logits.grad, ((logits.sigmoid() - labels) / 3).detach(), atol=1e-6) and labels.grad is None
    assert cross_encoder_loss(logits, labels.double()).dtype == torch.float32


def test_bi_encoder_loss():
    a, b, labels = draw(4, 3).requires_grad_(), draw(4, 3, seed=1), torch.tensor([0.0, 1.5, -0.5, 0.2], requires_grad=True)
    loss = bi_encoder_loss(a, b, labels)
    assert torch.allclose(loss, ((bi_encoder_scores(a, b) - labels) ** 2).mean())
    loss.backward()
    assert labels.grad is None and a.grad.abs().sum() > 0
    a.grad = None
    bi_encoder_loss(a, b, bi_encoder_scores(a, b)).backward()
    assert torch.equal(a.grad, torch.zeros_like(a))  # a reader of its own cosines has nothing to learn
    nothing = draw(0, 3).requires_grad_()
    empty = bi_encoder_loss(nothing, nothing, torch.zeros(0))
    empty.backward()
    assert empty == 0


def test_mutual_pseudo_labels():
    scores = [draw(6, seed=i).requires_grad_() for i in range(3)]
    mean = mutual_pseudo_labels(scores)
    assert torch.allclose(mean, sum(scores) / 3) and not mean.requires_grad
    assert torch.equal(mutual_pseudo_labels(scores[:1]), scores[0].detach()) and torch.allclose(mutual_pseudo_labels(scores[::-1]), mean)


@given(st.lists(st.tuples(st.text(), st.text(), st.floats(0, 1, width=32)), max_size=8))
def test_symmetric_examples(rows):
    first, second, labels = [r[0] for r in rows], [r[1] for r in rows], torch.tensor([r[2] for r in rows])
    one, two, doubled = symmetric_examples(first, second, labels)
    assert one[0::2] == two[1::2] == first and two[0::2] == one[1::2] == second
    assert torch.equal(doubled[0::2], labels) and torch.equal(doubled[1::2], labels) and len(doubled) == 2 * len(rows)


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30))
def test_spearman(pairs):
    x, y = torch.tensor(pairs).float().T
    rho = spearman_rho(x, y)
    assert isinstance(rho, float)
    if x.min() == x.max() or y.min() == y.max():
        assert math.isnan(rho)
    else:
        assert math.isclose(rho, stats.pearsonr(stats.rankdata(x), stats.rankdata(y)).statistic, abs_tol=1e-9)
        assert math.isclose(spearman_rho(x.exp(), y), rho, abs_tol=1e-9)  # ranks only


def test_refusals():
    a = draw(3, 4)
    for one, two in ((a, a[:2]), (a, a[:, :3]), (a[0], a[0]), (a[None], a[None])):
        with pytest.raises(ValueError, match="embeddings1 and embeddings2"):
            bi_encoder_scores(one, two)
        with pytest.raises(ValueError, match="embeddings1 and embeddings2"):
            bi_encoder_loss(one, two, torch.zeros(3))
    for labels in (torch.zeros(2), torch.zeros(3, 1), torch.tensor(0.0), torch.zeros(1)):
        with pytest.raises(ValueError, match="soft_labels must"):
            bi_encoder_loss(a, a, labels)
        with pytest.raises(ValueError, match="soft_labels must"):
            cross_encoder_loss(torch.zeros(3), labels)
    for logits in (torch.zeros(0), torch.zeros(3, 1), torch.tensor(0.0)):
        with pytest.raises(ValueError, match="logits must be"):
            cross_encoder_loss(logits, logits)
    with pytest.raises(ValueError, match="scores must hold at least one"):
        mutual_pseudo_labels([])
    with pytest.raises(ValueError, match=r"one shape, got \(3,\), \(2,\)"):
        mutual_pseudo_labels([torch.zeros(3), torch.zeros(2)])
    for first, second, labels in ((["a"], [], torch.zeros(1)), (["a"], ["b"], torch.zeros(2)), (["a"], ["b"], torch.zeros(1, 1))):
        with pytest.raises(ValueError, match="same length"):
            symmetric_examples(first, second, labels)
    with pytest.raises(ValueError, match="at least 2"):
        spearman_rho(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="same length"):
        spearman_rho(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="pooling must be"):
        BiEncoder(torch.nn.Embedding(3, 2), pooling="max")


def ids(rows=3, length=6, seed=0):
    result = torch.randint(5, 20, (rows, length), generator=torch.Generator().manual_seed(seed))
    result[0, 3:] = 0
    return result


@pytest.mark.parametrize("body", ["table", "transformer"])
def test_padding_changes_nothing(body):
    make = (lambda: torch.nn.Embedding(20, 8)) if body == "table" else (lambda: encoder(20, width=8, layers=1, heads=2, max_length=12, head=None, seed=0))
    first, second = ids(), ids(length=4, seed=1)
    padded = torch.nn.functional.pad(first, (0, 3))
    for reader in (BiEncoder(make()).eval(), BiEncoder(make(), pooling="first").eval(), AlignmentCrossEncoder(make(), 8, hidden=6).eval()):
        out = reader(first, second)
        assert out.shape == (3,) and torch.allclose(out, reader(padded, second), atol=1e-5)


def test_an_alignment_cross_encoder_may_depend_on_the_order_and_its_start_on_its_seed():
    table = torch.nn.Embedding(20, 8)
    first, second = ids(), ids(seed=1)
    one, same, other = (AlignmentCrossEncoder(table, 8, hidden=6, seed=seed) for seed in (1, 1, 2))
    assert not torch.allclose(one(first, second), one(second, first))
    assert torch.equal(one(first, second), same(first, second)) and not torch.equal(one(first, second), other(first, second))
    one(first, second).sum().backward()
    assert table.weight.grad.abs().sum() > 0 and one.sharpness.grad is not None


def test_joined_pairs():
    first, second = torch.tensor([[1, 7, 2, 0], [1, 8, 9, 2]]), torch.tensor([[1, 5, 2], [1, 2, 0]])
    joined, types = joined_pairs(first, second)
    assert joined.tolist() == [[1, 7, 2, 5, 2, 0], [1, 8, 9, 2, 2, 0]] and types.tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0]]
    assert joined_pairs(first, second, separator=2)[0].tolist() == [[1, 7, 2, 2, 5, 2, 0], [1, 8, 9, 2, 2, 2, 0]]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_models_of_the_paper_preset_are_known_classes(kind):
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
    pad = {"bert": 0, "roberta": 1}[kind]
    config = AutoConfig.for_model(kind, vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, pad_token_id=pad, num_labels=1)
    first, second = torch.tensor([[5, 7, 6, pad]]), torch.tensor([[5, 8, 9, 6]])
    cross = JoinedCrossEncoder(AutoModelForSequenceClassification.from_config(config), pad_id=pad, separator=6 if kind == "roberta" else None).eval()
    loss = cross_encoder_loss(cross(first, second), torch.tensor([0.5]))
    loss.backward()
    assert torch.isfinite(loss) and torch.allclose(cross(first, second), cross(torch.cat([first, first[:, 3:]], 1), second), atol=1e-5)
    bi = BiEncoder(AutoModel.from_config(config), pooling="first", pad_id=pad).eval()
    assert bi(first, second).shape == (1,)


def test_cycles():
    calls = []

    def score(number, model, pairs):
        return torch.tensor([float(model), float(len(pairs))])

    def train(kind, number, cycle, pairs, labels):
        calls.append((kind, number, cycle, pairs, labels.tolist()))
        return labels[0].item() + number + 1

    rounds = list(trans_encoder_cycles([0.0, 2.0], "aaa", "b", cycles=2, score=score, train=train))
    assert [name for name, _ in rounds] == ["bi0", "cross1", "bi1", "cross2", "bi2"]
    assert calls[0] == ("cross", 0, 1, "aaa", [1.0, 3.0]) and calls[2] == ("bi", 0, 1, "b", [2.5, 1.0]) and len(calls) == 8
    assert rounds[1][1] == [2.0, 3.0] and rounds[2][1] == [3.5, 4.5]
    for start, cycles in (([], 1), ([1.0], 0)):
        with pytest.raises(ValueError, match="start must hold at least one model and cycles"):
            list(trans_encoder_cycles(start, [], [], cycles=cycles, score=score, train=train))
