"""MiniLM: the contract of its functions, what the loss reaches, and the models that the presets name."""
import math

import pytest
import torch
from hypothesis import given, strategies as st

from conftest import golden
from kdbook.compression.minilm import minilm_loss, queries_keys_values, relation_kl, scaled_dot_product_relation, split_heads, teacher_assistant_plan
from kdbook.models import encoder


def vectors(size, number=3, shape=(2, 4, 6), seed=0):
    generator = torch.Generator().manual_seed(seed + size)
    return [torch.randn(*shape, size, generator=generator) for _ in range(number)]


def by_hand(q, k, mask):
    """Relation of one text after cutting the padding off: (A, t, t) probabilities."""
    q, k = q[:, mask], k[:, mask]
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)


def test_golden(shared):
    golden(shared, "compression/minilm")


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 20))
def test_split_heads_is_inverted_by_joining(heads, size, seed):
    x = torch.randn(2, 5, heads * size, generator=torch.Generator().manual_seed(seed))
    parts = split_heads(x, heads)
    assert parts.shape == (2, heads, 5, size) and torch.equal(parts.transpose(1, 2).flatten(2), x)


MASKS = {"none": None, "some": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool(), "inside": torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1]]).bool()}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_against_cut_texts(mask):
    student, teacher = vectors(3), vectors(5)
    loss = minilm_loss(*student, *teacher, mask)
    counted = torch.ones(2, 6, dtype=torch.bool) if mask is None else mask
    for key, (a, b) in {"attention": (0, 1), "value_relation": (2, 2)}.items():
        rows = []
        for i in range(2):
            p, q = by_hand(teacher[a][i], teacher[b][i], counted[i]), by_hand(student[a][i], student[b][i], counted[i])
            rows.append((p * (p / q).log()).sum(-1).flatten())
        assert torch.allclose(loss[key], torch.cat(rows).mean(), atol=1e-6)
    assert set(loss) == {"attention", "value_relation", "total"} and torch.isclose(loss["total"], loss["attention"] + loss["value_relation"])


@pytest.mark.parametrize("extra", [1, 7])
def test_more_padding_changes_nothing_whatever_it_holds(extra):
    student, teacher, mask = vectors(3), vectors(5), MASKS["some"]
    expected = minilm_loss(*student, *teacher, mask)
    for value in (0.0, 50.0, math.nan, math.inf):
        more = [torch.nn.functional.pad(x, (0, 0, 0, extra), value=value).requires_grad_() for x in (*student, *teacher)]
        loss = minilm_loss(*more, torch.nn.functional.pad(mask, (0, extra)))
        loss["total"].backward()
        assert all(torch.isclose(loss[key], expected[key], atol=1e-6) for key in expected)
        assert all(torch.isfinite(x.grad).all() for x in more[:3]) and all(x.grad is None for x in more[3:])


def test_masked_keys_are_minus_infinity_and_rows_sum_to_one():
    q, k = vectors(4, 2)
    relation = scaled_dot_product_relation(q, k, MASKS["some"])
    assert (relation[1, :, :, 3:] == -math.inf).all() and torch.isfinite(relation[0]).all()
    assert torch.allclose(relation.exp().sum(-1), torch.ones(2, 4, 6), atol=1e-6)
    assert torch.allclose(relation[1].exp()[..., :3], (q[1] @ k[1, :, :3].transpose(-1, -2) / 2).softmax(-1), atol=1e-6)


def test_nothing_counts():
    student, teacher = vectors(3), vectors(5)
    nothing = torch.zeros(2, 6, dtype=torch.bool)
    student = [x.requires_grad_() for x in student]
    loss = minilm_loss(*student, *teacher, nothing)
    loss["total"].backward()
    assert loss["total"] == 0 and all(torch.isfinite(x.grad).all() for x in student)
    one = nothing.clone()
    one[0] = True  # the other text is padding only
    loss = minilm_loss(*student, *teacher, one)
    alone = minilm_loss(*(x[:1] for x in student), *(x[:1] for x in teacher))
    assert torch.isclose(loss["total"], alone["total"]) and torch.isfinite(torch.stack(torch.autograd.grad(loss["total"], student))).all()


def test_relation_kl_takes_the_teacher_first():
    p, q = torch.tensor([[[[0.75, 0.25], [0.5, 0.5]]]]).log(), torch.full((1, 1, 2, 2), 0.5).log()
    assert torch.isclose(relation_kl(p, q), torch.tensor(0.130812 / 2), atol=1e-5)
    assert torch.isclose(relation_kl(q, p), torch.tensor(0.143841 / 2), atol=1e-5)
    assert relation_kl(p, p) == 0
    only_first = relation_kl(p, q, torch.tensor([[True, False]]))  # the second key is no key either: one token, one possible answer
    assert only_first == 0


@given(st.integers(0, 100))
def test_zero_for_a_copy_positive_otherwise_and_invariant_to_rotations(seed):
    student, teacher = vectors(3, seed=seed), vectors(5, seed=seed + 1)
    assert minilm_loss(*teacher, *teacher)["total"].abs() < 1e-6
    loss = minilm_loss(*student, *teacher)
    assert loss["attention"] > 0 and loss["value_relation"] > 0
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)))[0]
    turned = minilm_loss(*(x @ turn for x in student), *teacher)
    assert all(torch.isclose(loss[key], turned[key], atol=1e-5) for key in loss)


def test_gradient_is_the_difference_of_the_probabilities():
    student, teacher = vectors(3, 2), vectors(5, 2)
    scores = (student[0] @ student[1].transpose(-1, -2)).requires_grad_()
    target = scaled_dot_product_relation(*teacher)
    grad, = torch.autograd.grad(relation_kl(target, scores.log_softmax(-1)), scores)
    assert torch.allclose(grad, (scores.softmax(-1) - target.exp()).detach() / (2 * 4 * 6), atol=1e-7)


def test_half_precision_is_computed_in_float32():
    student, teacher = vectors(3), vectors(5)
    low = minilm_loss(*(x.bfloat16() for x in student), *(x.bfloat16() for x in teacher))
    assert low["total"].dtype == torch.float32 and torch.isclose(low["total"], minilm_loss(*student, *teacher)["total"], rtol=0.05)
    assert scaled_dot_product_relation(student[0].half(), student[1].half(), MASKS["some"]).dtype == torch.float32


def test_refusals():
    student, teacher = vectors(3), vectors(5)
    for other in ((2, 1, 6), (1, 4, 6), (2, 4, 1), (2, 4, 5)):
        with pytest.raises(ValueError, match="same batch, heads and tokens"):
            minilm_loss(*student, *vectors(5, shape=other))
        with pytest.raises(ValueError, match="same batch, heads and tokens"):
            minilm_loss(*vectors(3, shape=other), *teacher)
    with pytest.raises(ValueError, match="student_q, student_k and student_v must have one shape"):
        minilm_loss(student[0], student[1][:, :1], student[2], *teacher)
    for wrong in (torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 6), torch.ones(2, 4, 6, 6, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask must be a bool tensor"):
            minilm_loss(*student, *teacher, wrong)
        with pytest.raises(ValueError, match="mask must be a bool tensor"):
            relation_kl(scaled_dot_product_relation(*student[:2]), scaled_dot_product_relation(*teacher[:2]), wrong)
    with pytest.raises(ValueError, match="a and b must have one shape"):
        scaled_dot_product_relation(student[0], teacher[0])
    with pytest.raises(ValueError, match="num_heads must divide the width 5"):
        split_heads(torch.zeros(1, 2, 5), 2)
    for heads in (0, -1):
        with pytest.raises(ValueError, match="num_heads"):
            split_heads(torch.zeros(1, 2, 4), heads)
    with pytest.raises(ValueError, match="x must have shape"):
        split_heads(torch.zeros(2, 4), 2)


@pytest.mark.parametrize("teacher, student, middle", [((12, 768), (6, 768), []), ((12, 768), (12, 384), []), ((12, 768), (6, 384), [(12, 384)]),
                                                      ((12, 768), (7, 384), []), ((12, 768), (6, 400), []), ((5, 9), (2, 4), [(5, 4)]), ((5, 9), (3, 4), [])])
def test_plan(teacher, student, middle):
    assert teacher_assistant_plan(teacher, student) == [teacher, *middle, student]
    assert all(isinstance(size, tuple) for size in teacher_assistant_plan(list(teacher), list(student)))


def test_plan_refuses_sizes_below_one():
    with pytest.raises(ValueError, match=r"student must be \(layers, width\)"):
        teacher_assistant_plan((12, 768), (0, 384))


def test_relations_are_the_models_own_attention_and_who_gets_a_gradient():
    model = encoder(30, width=8, layers=3, heads=2, max_length=6, head=None, attention="eager", seed=0).eval()
    ids, mask = torch.randint(1, 30, (2, 6), generator=torch.Generator().manual_seed(0)), MASKS["some"]
    layers = queries_keys_values(model, ids, mask)
    own = model(ids, attention_mask=mask.long(), output_attentions=True).attentions
    assert len(layers) == 3
    for (q, k, v), attention in zip(layers, own):
        assert q.shape == (2, 2, 6, 4) and torch.allclose(scaled_dot_product_relation(q, k, mask).exp(), attention, atol=1e-5)
    minilm_loss(*layers[-1], *vectors(5, shape=(2, 2, 6)), mask)["total"].backward()
    last = model.encoder.layer[-1]
    assert last.attention.self.value.weight.grad.abs().sum() > 0 and model.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0
    assert last.attention.output.dense.weight.grad is None and last.intermediate.dense.weight.grad is None


def test_models_of_the_paper_preset_are_known_classes():
    """BERT, the teacher of presets/paper, and RoBERTa: built small, with one number of heads and two widths."""
    from transformers import AutoConfig, AutoModelForMaskedLM
    ids, mask = torch.randint(5, 30, (2, 6), generator=torch.Generator().manual_seed(0)), MASKS["some"]
    for kind in ("bert", "roberta"):
        make = lambda width, layers: AutoModelForMaskedLM.from_config(AutoConfig.for_model(
            kind, vocab_size=32, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=2 * width, max_position_embeddings=16)).eval()
        teacher, student = make(16, 4), make(8, 2)
        loss = minilm_loss(*queries_keys_values(student, ids, mask)[-1], *queries_keys_values(teacher, ids, mask)[-1], mask)
        loss["total"].backward()
        assert torch.isfinite(loss["total"]) and hasattr(student, "lm_head" if kind == "roberta" else "cls")


def test_a_model_of_another_kind_is_refused():
    from kdbook.models import decoder
    with pytest.raises(ValueError, match="attention.self.query"):
        queries_keys_values(decoder(20, width=8, layers=1, heads=2, max_length=6, seed=0), torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool))
