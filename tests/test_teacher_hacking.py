"""Teacher hacking: the contract of its functions against plain formulas, the tracker's rules, and the presets' models."""
import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from conftest import golden
from kdbook.llm.teacher_hacking import ProxyGoldenTracker, fit_power_law, power_law_deviation, sequence_divergence, token_divergence_loss

DIVERGENCES = ("forward_kl", "reverse_kl", "jeffreys")


def pair(shape=(2, 5, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator) * 2


def divergence_by_hand(student, teacher, name, temperature=1.0):
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    forward, reverse = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    return {"forward_kl": forward, "reverse_kl": reverse, "jeffreys": forward + reverse}[name]


def test_golden(shared):
    golden(shared, "llm/teacher_hacking")


def test_signatures():
    def names(function):
        return list(inspect.signature(function).parameters)
    assert names(token_divergence_loss) == ["student_logits", "teacher_logits", "mask", "divergence", "temperature"]
    assert names(sequence_divergence) == ["student_logits", "reference_logits", "mask", "divergence"]
    assert names(fit_power_law) == ["steps", "values"] and names(power_law_deviation) == ["steps", "values", "fit_until"]
    assert inspect.signature(ProxyGoldenTracker).parameters["tolerance"].default == 0.0
    assert names(ProxyGoldenTracker.record) == ["self", "step", "proxy", "golden"]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_against_the_formula(divergence, temperature):
    z, answers = pair()
    mask = torch.rand(2, 5, generator=torch.Generator().manual_seed(1)) > 0.4
    by_hand = divergence_by_hand(z, answers, divergence, temperature)
    assert torch.allclose(token_divergence_loss(z, answers, mask, divergence, temperature), by_hand[mask].mean(), atol=1e-5)
    assert torch.allclose(token_divergence_loss(z, answers, divergence=divergence, temperature=temperature), by_hand.mean(), atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_sequence_divergence_is_a_sum_over_counted_positions(divergence):
    z, answers = pair()
    mask = torch.rand(2, 5, generator=torch.Generator().manual_seed(1)) > 0.4
    by_hand = divergence_by_hand(z, answers, divergence)
    assert torch.allclose(sequence_divergence(z, answers, mask, divergence), (by_hand * mask).sum(-1), atol=1e-5)
    assert torch.allclose(sequence_divergence(z, answers, divergence=divergence), by_hand.sum(-1), atol=1e-5)
    mask[1] = False
    assert sequence_divergence(z, answers, mask, divergence)[1] == 0


def test_chain_rule():
    """The divergence of whole texts is the expected sum of the divergences of tokens: all 3 ** 3 texts of two random models, listed."""
    generator = torch.Generator().manual_seed(0)
    tables = [[torch.randn((3,) * (place + 1), generator=generator, dtype=torch.float64) for place in range(3)] for _ in range(2)]
    texts = torch.cartesian_prod(*[torch.arange(3)] * 3)  # (27, 3)
    p, q = (torch.stack([table[0].expand(27, 3), table[1][texts[:, 0]], table[2][texts[:, 0], texts[:, 1]]], 1) for table in tables)  # (27, 3, V)
    log_p, log_q = (x.log_softmax(-1).gather(-1, texts[..., None])[..., 0].sum(-1) for x in (p, q))
    assert torch.isclose((log_p.exp() * (log_p - log_q)).sum(), (log_p.exp() * sequence_divergence(q, p)).sum())


@given(st.integers(0, 50), st.sampled_from(DIVERGENCES))
def test_never_negative_zero_on_itself_and_jeffreys_is_symmetric(seed, divergence):
    z, answers = pair((3, 4), seed)
    assert token_divergence_loss(z, answers, divergence=divergence) > 0
    assert abs(token_divergence_loss(z, z + 3, divergence=divergence)) < 1e-6
    assert torch.isclose(token_divergence_loss(z, answers, divergence="jeffreys"), token_divergence_loss(answers, z, divergence="jeffreys"))
    assert torch.isclose(token_divergence_loss(z, answers, divergence="forward_kl"), token_divergence_loss(answers, z, divergence="reverse_kl"))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gradient_reaches_the_student_only(divergence):
    z, answers = pair()
    z.requires_grad_(), answers.requires_grad_()
    token_divergence_loss(z, answers, divergence=divergence).backward()
    assert answers.grad is None and torch.isfinite(z.grad).all() and z.grad.abs().sum() > 0


def test_masked_positions_may_hold_anything():
    z, answers = pair()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 0] = False
    token, sequence = token_divergence_loss(z, answers, mask), sequence_divergence(z, answers, mask)
    z[0, 0], answers[0, 0] = math.nan, math.inf
    assert torch.isclose(token_divergence_loss(z, answers, mask), token) and torch.allclose(sequence_divergence(z, answers, mask), sequence)


def test_refusals_of_the_divergences():
    z, answers = pair()
    for function in (token_divergence_loss, sequence_divergence):
        with pytest.raises(ValueError, match="divergence must be one of 'forward_kl', 'reverse_kl', 'jeffreys', got 'js'"):
            function(z, answers, divergence="js")
        with pytest.raises(ValueError, match="share one vocabulary"):
            function(z, answers[..., :5])
        with pytest.raises(ValueError, match="must have shape"):
            function(z, answers[:1])
        with pytest.raises(ValueError, match="mask must be a bool tensor"):
            function(z, answers, torch.ones(2, 4, dtype=torch.bool))
        with pytest.raises(ValueError, match="mask must be a bool tensor"):
            function(z, answers, torch.ones(2, 5))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be > 0"):
            token_divergence_loss(z, answers, temperature=temperature)
    with pytest.raises(ValueError, match="nothing counts"):
        token_divergence_loss(z, answers, torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="position"):
        sequence_divergence(z[0, 0], answers[0, 0])


@given(st.floats(0.01, 100), st.floats(-2, 2))
def test_a_power_law_is_recovered_and_deviates_nowhere(scale, exponent):
    steps = torch.tensor([1, 3, 10, 40, 200])
    values = scale * steps.double() ** -exponent
    fit = fit_power_law(steps, values)
    assert list(fit) == ["scale", "exponent"] and math.isclose(fit["scale"], scale, rel_tol=1e-6) and math.isclose(fit["exponent"], exponent, abs_tol=1e-6)
    assert all(isinstance(value, float) for value in fit.values())
    assert power_law_deviation(steps, values, 10).abs().max() < 1e-6


def test_least_squares_of_a_bent_curve():
    steps, values = torch.tensor([1, 2, 4, 8]), torch.tensor([1.0, 0.7, 0.6, 0.5])
    slope, constant = np.polyfit(np.log(steps.numpy()), np.log(values.numpy()), 1)
    fit = fit_power_law(steps, values)
    assert math.isclose(fit["exponent"], -slope, rel_tol=1e-5) and math.isclose(fit["scale"], math.exp(constant), rel_tol=1e-5)


def test_deviation_is_fitted_early_and_told_everywhere():
    steps, values = torch.tensor([1, 10, 100, 1000]), torch.tensor([2.0, 1.0, 0.5, 0.5])
    deviation = power_law_deviation(steps, values, 100)
    assert torch.allclose(deviation, torch.tensor([0.0, 0.0, 0.0, math.log(2)]).to(deviation.dtype), atol=1e-6)
    assert deviation.shape == (4,)


def test_refusals_of_the_power_law():
    for steps, values, message in (([1], [1.0], "at least 2"), ([1, 2], [1.0], "same length|lengths"), ([0, 1], [1.0, 1.0], "steps must be > 0"), ([1, 2], [1.0, 0.0], "values must be > 0"),
                                   ([1, 2], [1.0, -2.0], "values must be > 0"), ([1, 2], [1.0, math.nan], "values must be > 0"), ([3, 3], [1.0, 2.0], "different")):
        with pytest.raises(ValueError, match=message):
            fit_power_law(torch.tensor(steps), torch.tensor(values))
    with pytest.raises(ValueError, match="fit_until"):
        power_law_deviation(torch.tensor([1, 10, 100]), torch.tensor([1.0, 0.5, 0.2]), 5)
    with pytest.raises(ValueError, match="values must be > 0"):  # also behind the window
        power_law_deviation(torch.tensor([1, 10, 100]), torch.tensor([1.0, 0.5, 0.0]), 10)


def tracked(proxy, golden, tolerance=0.0):
    tracker = ProxyGoldenTracker(tolerance)
    for step, (p, g) in enumerate(zip(proxy, golden), 1):
        tracker.record(step, p, g)
    return tracker


@pytest.mark.parametrize("proxy, golden, onset", [
    ([0.9, 0.5, 0.4, 0.3], [0.8, 0.4, 0.45, 0.6], 2),  # the U shape
    ([0.9, 0.5, 0.4, 0.3], [0.8, 0.6, 0.5, 0.4], None),  # healthy
    ([0.9, 0.5, 0.4, 0.6], [0.8, 0.4, 0.45, 0.6], None),  # overfitting: the proxy is no better than it was at the best golden
    ([0.9, 0.5, 0.4, 0.5], [0.8, 0.4, 0.45, 0.6], None),  # equal is not below
    ([0.9, 0.5, 0.4, 0.3], [0.8, 0.4, 0.4, 0.6], 2),  # the first of two smallest
    ([0.9, 0.5, 0.6, 0.55], [0.8, 0.4, 0.4, 0.6], None),  # ... whose proxy counts
    ([0.9, 0.5], [0.8, 0.8], None),  # equal golden is no rise
    ([1.0], [1.0], None), ([], [], None)])
def test_onset(proxy, golden, onset):
    tracker = tracked(proxy, golden)
    assert tracker.onset() == onset and tracker.is_hacking() == (onset is not None)


def test_tolerance_is_relative():
    proxy, golden = [0.9, 0.5, 0.3], [0.8, 0.4, 0.43]
    assert tracked(proxy, golden, 0.05).onset() == 2 and tracked(proxy, golden, 0.1).onset() is None


def test_regret():
    assert math.isclose(tracked([1, 1, 1], [0.8, 0.4, 0.6]).golden_regret(), 0.2) and tracked([1, 1], [0.8, 0.4]).golden_regret() == 0
    with pytest.raises(ValueError, match="nothing"):
        ProxyGoldenTracker().golden_regret()


def test_refusals_of_the_tracker():
    for tolerance in (-0.1, math.nan):
        with pytest.raises(ValueError, match="tolerance must be >= 0"):
            ProxyGoldenTracker(tolerance)
    tracker = tracked([1.0], [1.0])
    for step in (1, 0):
        with pytest.raises(ValueError, match="step must be above 1"):
            tracker.record(step, 0.5, 0.5)
    with pytest.raises(ValueError, match="golden must be a finite number"):
        tracker.record(2, 0.5, math.nan)
    tracker.record(2, torch.tensor(0.5), torch.tensor(1.5))  # a refused record leaves nothing behind
    assert tracker.onset() == 1


def test_models_of_the_paper_preset_are_known_classes(root):
    """Flan-T5 and T5 v1.1: the class that the names in presets/paper resolve to, built small; online texts of the student, loss and gradient."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM
    sizes = dict(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    teacher, student = (AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes)) for _ in range(2))
    prompts = torch.arange(2, 10).view(2, 4)
    texts = student.eval().generate(input_ids=prompts, do_sample=True, top_k=0, min_new_tokens=5, max_new_tokens=5, suppress_tokens=[0])
    mask = texts[:, 1:] != 0
    assert mask.shape == (2, 5) and mask.all()  # neither the end nor padding was drawn
    logits = [model(input_ids=prompts, decoder_input_ids=texts[:, :-1]).logits for model in (student, teacher)]
    loss = token_divergence_loss(*logits, mask)
    loss.backward()
    assert torch.isfinite(loss) and student.shared.weight.grad is not None and teacher.shared.weight.grad is None
    assert torch.allclose((sequence_divergence(*logits, mask).sum() / mask.sum()), loss, atol=1e-6)
