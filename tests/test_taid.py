"""TAID: the contract of its functions, the schedule, and the presets' models."""
import math

import pytest
import torch
from hypothesis import given, strategies as st

from conftest import golden
from kdbook.llm.taid import TAIDScheduler, forward_kl_loss, interpolated_teacher_probs, reverse_kl_loss, taid_loss


def pair(shape=(2, 5, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator) * 2


def test_golden(shared):
    golden(shared, "llm/taid")


@pytest.mark.parametrize("t", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_against_the_formula(t, temperature):
    z, answers = pair()
    p = (((1 - t) * z + t * answers) / temperature).softmax(-1)
    q = (z / temperature).softmax(-1)
    mask = torch.rand(2, 5, generator=torch.Generator().manual_seed(1)) > 0.4
    assert torch.allclose(interpolated_teacher_probs(z, answers, t, temperature), p, atol=1e-6)
    assert torch.allclose(taid_loss(z, answers, t, mask, temperature), -(p * q.log()).sum(-1)[mask].mean(), atol=1e-5)
    assert torch.allclose(taid_loss(z, answers, t, mask, temperature, True), (p * (p / q).log()).sum(-1)[mask].mean(), atol=1e-5)
    r = (answers / temperature).softmax(-1)
    assert torch.allclose(reverse_kl_loss(z, answers, mask, temperature), (q * (q / r).log()).sum(-1)[mask].mean(), atol=1e-5)
    assert forward_kl_loss(z, answers, mask, temperature) == taid_loss(z, answers, 1.0, mask, temperature)


@given(st.floats(0, 1), st.integers(0, 50))
def test_gradient_is_student_minus_target_and_reaches_the_student_only(t, seed):
    z, answers = pair((3, 6), seed)
    z.requires_grad_(), answers.requires_grad_()
    for entropy in (False, True):
        z.grad = None
        taid_loss(z, answers, t, include_entropy=entropy).backward()
        assert torch.allclose(z.grad, (z.softmax(-1) - interpolated_teacher_probs(z, answers, t)).detach() / 3, atol=1e-6)
        assert answers.grad is None
    assert not interpolated_teacher_probs(z, answers, t).requires_grad


def test_masked_positions_do_not_count_even_if_infinite():
    z, answers = pair()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 0] = False
    expected = taid_loss(z, answers, 0.5, mask)
    z[0, 0], answers[0, 0] = math.nan, math.inf
    assert torch.allclose(taid_loss(z, answers, 0.5, mask), expected)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_tokens_with_student_logit_minus_infinity_contribute_nothing(t):
    z, answers = pair((2, 6))
    z[:, 2] = -math.inf
    z.requires_grad_()
    loss = taid_loss(z, answers, t)
    p = interpolated_teacher_probs(z, answers, t)
    kept = [0, 1, 3, 4, 5]
    assert torch.allclose(loss, -(p[:, kept] * z.log_softmax(-1)[:, kept]).sum(-1).mean(), atol=1e-6) and torch.isfinite(loss)
    loss.backward()
    assert torch.isfinite(z.grad).all()


def test_half_precision_is_computed_in_float32():
    z, answers = pair()
    low = taid_loss(z.bfloat16(), answers.bfloat16(), 0.3)
    assert low.dtype == torch.float32 and torch.allclose(low, taid_loss(z.bfloat16().float(), answers.bfloat16().float(), 0.3))
    assert interpolated_teacher_probs(z.half(), answers.half(), 0.3).dtype == torch.float32


def test_refusals():
    z, answers = pair()
    for t in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"t must be in \[0, 1\]"):
            taid_loss(z, answers, t)
    for function in (lambda m: taid_loss(z, answers, 0.5, m), lambda m: reverse_kl_loss(z, answers, m), lambda m: forward_kl_loss(z, answers, m)):
        with pytest.raises(ValueError, match="mask must have shape"):
            function(torch.ones(2, 4, dtype=torch.bool))
        with pytest.raises(ValueError, match="at least one position"):
            function(torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="same shape"):
        interpolated_teacher_probs(z, answers[..., :5], 0.5)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        interpolated_teacher_probs(z, answers, 0.5, 0.0)
    for bad in ({"t_start": 1.0}, {"t_start": -0.1}, {"t_end": 0.0}, {"t_end": 1.2}, {"t_start": 0.8, "t_end": 0.5}, {"alpha": -1e-3}, {"alpha": 1.5}, {"num_steps": 0}, {"t_start": math.nan}):
        with pytest.raises(ValueError, match=next(iter(bad)) if len(bad) == 1 else "t_start must not be above"):
            TAIDScheduler(**{"num_steps": 10, **bad})


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=60), st.floats(0, 1), st.floats(0, 0.999), st.floats(0, 0.9))
def test_the_schedule_never_falls_behind_or_goes_back(losses, alpha, beta, start):
    schedule = TAIDScheduler(len(losses), t_start=start, alpha=alpha, beta=beta)
    linear = TAIDScheduler(len(losses), t_start=start, adaptive=False)
    before = start
    for step, loss in enumerate(losses):
        t, line = schedule.update(torch.tensor(loss), step), linear.update(loss, step)
        assert before - 1e-12 <= t <= 1 and t >= line - 1e-12 and math.isclose(line, start + (1 - start) * step / len(losses))
        before = t


def test_the_first_call_only_remembers_and_state_is_kept():
    schedule = TAIDScheduler(10, alpha=0.5)
    assert schedule.update(3.0, 5) == 0.4 and schedule.momentum == 0.0
    schedule.update(2.0, 6)
    other = TAIDScheduler(10, alpha=0.5)
    other.load_state_dict(schedule.state_dict())
    assert other.update(1.0, 7) == schedule.update(1.0, 7)


def test_models_of_the_paper_preset_are_known_classes(root):
    """Phi-3, Llama and GPT-NeoX (Pythia), StableLM: the classes that the names in presets/paper resolve to, built small and run."""
    from transformers import AutoConfig, AutoModelForCausalLM
    for kind, sizes in (("phi3", {"pad_token_id": 0}), ("llama", {}), ("gpt_neox", {}), ("stablelm", {})):
        config = AutoConfig.for_model(kind, vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, **sizes)
        model = AutoModelForCausalLM.from_config(config)
        ids = torch.arange(8)[None]
        loss = taid_loss(model(ids).logits, torch.randn(1, 8, 32), 0.4, ids > 2)
        loss.backward()
        assert torch.isfinite(loss)
