"""kdbook.losses and kdbook.representations: golden numbers, the forms that chapters build on them, properties, gradients, refusals."""
import importlib.util
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.autograd import gradcheck

from kdbook import losses, representations
from kdbook.losses import (attention_kl, contrastive_loss, cross_entropy, ensemble_probabilities, forward_kl, hidden_cosine, hidden_distance,
                           hidden_mse, info_nce, jsd, linear_cka, masked_mean, reverse_kl, rkd_angle_loss, rkd_distance_loss, sequence_log_prob,
                           similarity, skew_kl, skew_reverse_kl, soft_cross_entropy, soft_target_loss, token_log_probs, total_variation)

torch.set_num_threads(1)
INF, NAN = float("inf"), float("nan")
DIVERGENCES = [forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, total_variation]
quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)
shapes = st.sampled_from([(4,), (3, 5), (2, 3, 4), (1, 2, 2, 3)])


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(shape, seed, scale=2.0):
    return (scale * randn(2, *shape, seed=seed)).unbind()


@pytest.fixture(scope="module")
def checker(shared):
    spec = importlib.util.spec_from_file_location("check_golden", shared / "tools" / "check_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def golden_cases(shared, slug):
    return json.loads((shared / "golden" / f"{slug}.json").read_text())["cases"]


# ---------------------------------------------------------------- golden numbers
def test_golden_numbers(shared, checker):
    cases = [case for case in golden_cases(shared, "foundations/losses") if case["call"].startswith("kdbook.losses.")]
    assert len(cases) >= 15
    assert {case["name"]: checker.check(case) for case in cases} == {case["name"]: None for case in cases}


def tcm(u, v, temperature=1.0):
    views, n = torch.cat([u, v]), len(u)
    return info_nce(views, views, torch.arange(2 * n).roll(n), candidates=~torch.eye(2 * n, dtype=torch.bool), normalize=False, temperature=temperature) / 2


def position_contrast(s, t, temperature=1.0):
    views, b = torch.cat([s, t]).transpose(0, 1), len(s)
    return info_nce(views, views, torch.arange(2 * b).roll(b), candidates=~torch.eye(2 * b, dtype=torch.bool), temperature=temperature)


def nt_xent(embeddings, labels, temperature=0.07):
    same, eye = labels[:, None] == labels, torch.eye(len(labels), dtype=torch.bool)
    return contrastive_loss(similarity(embeddings) / temperature, same & ~eye, candidates=~same, denominator="own", average="pairs", empty="error")


def two_sided(audio, text, labels, temperature=0.1):
    s, same = similarity(audio, text) / temperature, labels[:, None] == labels
    return (contrastive_loss(s, same) + contrastive_loss(s.T, same)) / 2


def nspt(student, teacher, labels, rehearsal, temperature=0.1, negatives="student"):
    same, eye = labels[:, None] == labels, torch.eye(len(labels), dtype=torch.bool)
    with_teacher = similarity(student, teacher)
    scores = torch.where(same, with_teacher, similarity(student) if negatives == "student" else with_teacher) / temperature
    return contrastive_loss(scores, same & ~eye, candidates=~eye, anchors=rehearsal)


def mulki_prototypes(v, w, u, y, temperature):
    present = y.unique()
    return info_nce(v, w, y, temperature=temperature) + info_nce(w[present], u, present, temperature=temperature)


def taid(z, v, t, mask=None):
    return soft_cross_entropy(z, ((1 - t) * z + t * v).softmax(-1), mask=mask, empty="error")


def jeffreys(z, v, mask=None, divergence="forward_kl"):
    both = forward_kl(z, v, mask=mask, empty="error"), reverse_kl(z, v, mask=mask, empty="error")
    return sum(both) if divergence == "jeffreys" else both[0]


def llava_divergence(z, v, mask, kind, lam):
    return {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "js": lambda *a, **k: jsd(*a, beta=1 - lam, **k)}[kind](z, v, mask=mask, empty="error")


def intermediate(s, t, kind, mask=None):
    return hidden_distance(s, t, kind={"mse": "mse", "pkd": "sse"}[kind], normalize=kind == "pkd", mask=mask)


def dual_teachers(z, teachers, weights, temperature):
    values = forward_kl(z.expand_as(teachers), teachers, temperature=temperature, reduction="none")
    return temperature**2 * (weights * values).sum(0).mean()


def spans(ss, se, ts, te, temperature):
    return temperature**2 * (forward_kl(ss, ts, temperature=temperature) + forward_kl(se, te, temperature=temperature)) / 2


def token_scores(logits, ids, score_mask, reduction="mean"):
    return sequence_log_prob(logits, torch.where(score_mask, ids, -100), shift=True, average=reduction == "mean")


def mimic(z, v, labels, distill_all_tokens=False):
    return soft_cross_entropy(z, v.softmax(-1), mask=None if distill_all_tokens else labels != -100, empty="error")


# The expressions by which SHARED_PIECES says that the chapters call these foundations, against the chapters' own golden numbers.
CHAPTER_FORMS = {
    "compression/distiller intermediate_loss": intermediate,
    "compression/dmae feature_alignment_loss": lambda s, t: hidden_distance(s, t, kind="mae", normalize=True),
    "compression/kd3 weighted_feature_loss": lambda s, t, w: hidden_distance(s, t, weights=w, empty="error"),
    "compression/kd3 instance_alignment_loss": lambda s, t, temperature: info_nce(s, t, temperature=temperature),
    "compression/meal_v2 ensemble_soft_labels": ensemble_probabilities,
    "compression/romanian_bert ensemble_probabilities": ensemble_probabilities,
    "compression/similar_tasks linear_cka": linear_cka,
    "multilingual/mllm_survey linear_cka": linear_cka,
    "compression/well_read distillation_loss": lambda z, v: soft_cross_entropy(z, v.softmax(-1)),
    "compression/ernie_tiny soft_label_loss": lambda z, v: soft_cross_entropy(z, v.softmax(-1)),
    "llm/ddk ddk_loss": lambda z, v, y: cross_entropy(z, y, empty="error") + 0.2 * forward_kl(z, v, mask=y != -100),
    "llm/demonstration_retrieval dpr_loss": lambda q, p: info_nce(q, p, temperature=1.0, normalize=False),
    "llm/frontier_synthetic sft_loss": lambda z, y: cross_entropy(z, y, shift=True, empty="error"),
    "llm/taid taid_loss": taid,
    "llm/taid reverse_kl_loss": lambda z, v, mask: reverse_kl(z, v, mask=mask, empty="error"),
    "llm/teacher_hacking token_divergence_loss": jeffreys,
    "llm/teacher_hacking sequence_divergence": lambda z, v, mask: forward_kl(z, v, mask=mask, reduction="none").sum(-1),
    "multilingual/bloomz rank_candidates": sequence_log_prob,
    "multilingual/colbert_xm pairwise_softmax_loss": lambda scores, nway: cross_entropy(scores.view(-1, nway), torch.zeros(len(scores) // nway, dtype=torch.int64)),
    "multilingual/crosslingual_qa span_distillation_loss": spans,
    "multilingual/lexical_specialization nt_xent_loss": nt_xent,
    "multilingual/translico tcm_loss": tcm,
    "multilingual/xglm candidate_scores": token_scores,
    "multimodal/coconut nspt_loss": nspt,
    "multimodal/coconut multimodal_contrastive_loss": two_sided,
    "multimodal/comd response_score": lambda z, y: sequence_log_prob(z, y, average=True).exp(),
    "multimodal/llava_kd token_divergence": llava_divergence,
    "multimodal/llava_kd relation_matrix": similarity,
    "multimodal/llava_kd relation_distillation_loss": lambda s, t: hidden_cosine(similarity(s).flatten(1), similarity(t).flatten(1)),
    "multimodal/llava_mod mimic_distillation_loss": mimic,
    "multimodal/llava_mod sequence_logprob": lambda z, y, average=False: sequence_log_prob(z, y, shift=True, average=average),
    "multimodal/mulki relation_logits": lambda x, w, temperature: similarity(x, w) / temperature,
    "multimodal/mulki prototype_alignment_loss": mulki_prototypes,
    "multimodal/mulki dual_teacher_distillation_loss": dual_teachers,
    "multimodal/vidlankd contrastive_kd_loss": position_contrast,
    "multimodal/vlm_ood feature_mse_loss": lambda s, t: hidden_distance(s, t, kind="sse", normalize=True),
    "multimodal/vlm_ood image_contrastive_loss": lambda s, t, temperature, bidirectional: info_nce(s, t, temperature=temperature, symmetric=bidirectional),
    "multimodal/vlm_ood open_vocabulary_cls_loss": lambda s, w, y, temperature: info_nce(s, w, y, temperature=temperature),
    "selfdistill/modular_encoder clip_loss": lambda u, v, scale: info_nce(u, v, temperature=1 / scale, symmetric=True),
}


@pytest.mark.parametrize("name", CHAPTER_FORMS)
def test_forms_of_the_chapters_give_their_golden_numbers(shared, checker, name):
    slug, function = name.split(" ")
    cases = [case for case in golden_cases(shared, slug) if case["call"].endswith("." + function) and not (isinstance(case["expect"], dict) and "raises" in case["expect"])]
    assert cases
    for case in cases:
        got = CHAPTER_FORMS[name](*checker.decode(case["args"]), **checker.decode(case.get("kwargs", {})))
        assert checker.difference(got, case["expect"], case.get("rtol", 1e-5), case.get("atol", 1e-6)) is None, case["name"]


# ---------------------------------------------------------------- means and labels
def test_masked_mean_by_hand():
    v = torch.tensor([1.0, 2.0, 6.0])
    assert masked_mean(v) == 3.0
    assert masked_mean(v, torch.tensor([True, True, False])) == 1.5
    assert masked_mean(v, weights=torch.tensor([1.0, 0.0, 3.0])) == 19 / 4
    assert masked_mean(v, torch.tensor([True, True, False]), weights=torch.tensor([1.0, 3.0, 100.0])) == 7 / 4
    assert masked_mean(torch.tensor([True, False, False, True])) == 0.5
    assert masked_mean(torch.tensor(5.0)) == 5.0


def test_masked_mean_with_nothing_counted_is_zero_with_a_gradient_path():
    for mask, weights in ((torch.zeros(3, dtype=torch.bool), None), (None, torch.zeros(3))):
        v = torch.tensor([1.0, INF, NAN], requires_grad=True)
        mean = masked_mean(v, mask, weights=weights)
        mean.backward()
        assert mean == 0 and v.grad.tolist() == [0, 0, 0]
        with pytest.raises(ValueError, match="nothing counts"):
            masked_mean(v, mask, weights=weights, empty="error")
    empty = torch.zeros(0, requires_grad=True)
    masked_mean(empty).backward()
    assert masked_mean(empty) == 0


@quick
@given(seeds, shapes)
def test_masked_mean_equals_the_mean_of_the_selected(seed, shape):
    values, mask = randn(*shape, seed=seed), randn(*shape, seed=seed + 1) > 0
    expected = values[mask].mean() if mask.any() else torch.tensor(0.0, dtype=torch.float64)
    assert torch.isclose(masked_mean(values, mask), expected)
    garbage = torch.where(mask, values, NAN).requires_grad_()
    masked_mean(garbage, mask).backward()
    assert torch.isfinite(garbage.grad).all()


@pytest.mark.parametrize("shift", [False, True])
def test_token_log_probs_against_a_loop(shift):
    logits, labels = randn(2, 4, 5), torch.tensor([[1, -100, 4, 0], [2, 2, -100, 3]])
    log_probs, counted = token_log_probs(logits, labels, shift=shift)
    for n in range(2):
        for t in range(4 - shift):
            label = labels[n, t + shift].item()
            assert counted[n, t] == (label != -100)
            assert math.isclose(log_probs[n, t], logits[n, t].log_softmax(-1)[label] if label != -100 else 0, abs_tol=1e-12)


def test_ignored_positions_may_hold_anything():
    logits = torch.tensor([[0.0, 0.0], [NAN, INF]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0, -100]), label_smoothing=0.1)
    loss.backward()
    assert math.isclose(loss.item(), math.log(2), rel_tol=1e-6) and torch.isfinite(logits.grad).all() and not logits.grad[1].any()


@quick
@given(seeds, st.sampled_from([0.0, 0.1, 1.0]), st.booleans())
def test_cross_entropy_equals_torch(seed, smoothing, shift):
    logits = randn(2, 5, 6, seed=seed)
    labels = torch.randint(-1, 6, (2, 5), generator=torch.Generator().manual_seed(seed))
    labels[labels == -1] = -100
    labels[0, 1] = 3
    z, y = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    expected = F.cross_entropy(z.reshape(-1, 6), y.reshape(-1), label_smoothing=smoothing)
    assert torch.isclose(cross_entropy(logits, labels, label_smoothing=smoothing, shift=shift), expected)


def test_cross_entropy_weights_follow_the_labels():
    logits, labels, weights = randn(1, 3, 4), torch.tensor([[0, 1, 2]]), torch.tensor([[9.0, 1.0, 3.0]])
    nll = -logits[0, :2].log_softmax(-1).gather(-1, torch.tensor([[1], [2]]))[:, 0]
    assert torch.isclose(cross_entropy(logits, labels, weights=weights, shift=True), (nll[0] + 3 * nll[1]) / 4)
    all_ignored = torch.full((1, 3), -100)
    assert cross_entropy(logits, all_ignored) == 0
    with pytest.raises(ValueError, match="nothing counts"):
        cross_entropy(logits, all_ignored, empty="error")


def test_minus_inf_logits_have_finite_gradients_in_cross_entropy():
    logits = torch.tensor([[0.0, 1.0, -INF]], requires_grad=True)
    cross_entropy(logits, torch.tensor([0])).backward()
    assert torch.isfinite(logits.grad).all()


def test_sequence_log_prob():
    logits = torch.zeros(2, 3, 4)
    labels = torch.tensor([[0, 1, -100], [3, -100, -100]])
    assert torch.allclose(sequence_log_prob(logits, labels), -math.log(4) * torch.tensor([2.0, 1.0]))
    assert torch.allclose(sequence_log_prob(logits, labels, average=True), torch.full((2,), -math.log(4)))
    with pytest.raises(ValueError, match="sequence 1"):
        sequence_log_prob(logits, labels, shift=True)


# ---------------------------------------------------------------- divergences
@quick
@given(seeds, shapes, st.floats(0.3, 5.0))
def test_divergences_are_zero_iff_equal_and_positive_otherwise(seed, shape, temperature):
    student, teacher = pair(shape, seed)
    for divergence in DIVERGENCES:
        assert abs(divergence(student, student + 3.0, temperature=temperature)) < 1e-12  # a shift of all logits changes nothing
        assert divergence(student, teacher, temperature=temperature) > 1e-6


@quick
@given(seeds, st.floats(0.05, 0.95))
def test_bounds(seed, share):
    student, teacher = pair((3, 6), seed, scale=8.0)
    assert torch.isclose(jsd(student, teacher), jsd(teacher, student))
    assert (jsd(student, teacher, reduction="none") <= math.log(2) + 1e-12).all()
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert (jsd(student, teacher, beta=share, reduction="none") <= entropy + 1e-12).all()
    for skew in (skew_kl, skew_reverse_kl):
        assert (skew(student, teacher, alpha=share, reduction="none") <= -math.log(share) + 1e-12).all()
    tv = total_variation(student, teacher, reduction="none")
    assert (tv <= 1).all() and (2 * tv**2 <= forward_kl(student, teacher, reduction="none") + 1e-12).all()
    assert torch.isclose(total_variation(student, teacher), total_variation(teacher, student))


def test_ends_and_sides_of_the_mixtures():
    student, teacher = pair((4, 5), 3)
    q, p = student.softmax(-1), teacher.softmax(-1)
    kl = lambda a, b: (a * (a / b).log()).sum(-1).mean()
    assert jsd(student, teacher, beta=0) == forward_kl(student, teacher) and jsd(student, teacher, beta=1) == reverse_kl(student, teacher)
    m = 0.2 * p + 0.8 * q  # beta weighs the teacher
    assert torch.isclose(jsd(student, teacher, beta=0.2), 0.2 * kl(p, m) + 0.8 * kl(q, m))
    assert torch.isclose(skew_kl(student, teacher, alpha=0.2), kl(p, m))
    assert torch.isclose(skew_reverse_kl(student, teacher, alpha=0.2), kl(q, 0.2 * q + 0.8 * p))
    assert torch.isclose(reverse_kl(student, teacher), forward_kl(teacher, student))
    for skew, plain in ((skew_kl, forward_kl), (skew_reverse_kl, reverse_kl)):
        assert skew(student, teacher, alpha=0) == plain(student, teacher) and skew(student, teacher, alpha=1) == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_match_finite_differences_on_both_sides(divergence):
    student, teacher = (x.requires_grad_() for x in pair((2, 4), 1))
    mask = torch.tensor([True, False])
    assert gradcheck(lambda s, t: divergence(s, t, temperature=1.7), (student, teacher))
    assert gradcheck(lambda s, t: divergence(s, t, mask=mask), (student, teacher))


def test_soft_cross_entropy_is_entropy_plus_kl_and_has_its_gradient():
    student, teacher = pair((3, 4), 5)
    p = (teacher / 2).softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    assert torch.isclose(soft_cross_entropy(student, p, temperature=2.0), entropy + forward_kl(student, teacher, temperature=2.0))
    assert gradcheck(lambda s, t: soft_cross_entropy(s, t, temperature=2.0), (student.requires_grad_(), p.requires_grad_()))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_shapes_reduction_and_masks(divergence, shape):
    student, teacher = pair(shape, 7)
    values = divergence(student, teacher, reduction="none")
    assert values.shape == shape[:-1] and torch.isclose(divergence(student, teacher), values.mean())
    mask = torch.ones(shape[:-1], dtype=torch.bool)
    assert divergence(student, teacher, mask=mask) == divergence(student, teacher)
    assert divergence(student, teacher, mask=~mask) == 0
    with pytest.raises(ValueError, match="nothing counts"):
        divergence(student, teacher, mask=~mask, empty="error")


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_positions_poison_neither_value_nor_gradient(divergence):
    student, teacher = pair((4, 5), 2)
    mask = torch.tensor([True, False, True, False])
    expected = divergence(student[mask], teacher[mask])
    for garbage in (NAN, INF, -INF):
        s, t = (torch.where(mask[:, None], x, garbage).requires_grad_() for x in (student, teacher))
        value = divergence(s, t, mask=mask)
        value.backward()
        assert torch.isclose(value, expected)
        for x in (s, t):
            assert torch.isfinite(x.grad).all() and not x.grad[~mask].any()
        assert divergence(s, t, mask=mask, reduction="none")[~mask].tolist() == [0, 0]


@quick
@given(seeds, st.sampled_from(DIVERGENCES))
def test_order_of_classes_and_positions_does_not_matter(seed, divergence):
    student, teacher = pair((6, 4), seed)
    mask = randn(6, seed=seed) > -0.5
    classes, positions = (torch.randperm(n, generator=torch.Generator().manual_seed(seed)) for n in (4, 6))
    value = divergence(student, teacher, mask=mask)
    assert torch.isclose(divergence(student[:, classes], teacher[:, classes], mask=mask), value)
    assert torch.isclose(divergence(student[positions], teacher[positions], mask=mask[positions]), value)


def test_impossible_classes():
    student = torch.tensor([[0.5, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0, -INF]], dtype=torch.float64, requires_grad=True)
    p, q = teacher.detach().softmax(-1), student.detach().softmax(-1)
    forward_kl(student, teacher).backward()
    assert torch.allclose(student.grad, q - p) and torch.isfinite(teacher.grad).all()
    for divergence in (jsd, skew_kl, skew_reverse_kl, total_variation):
        student.grad = None
        value = divergence(student, teacher)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(student.grad).all()
    assert reverse_kl(student, teacher) == INF
    student.grad = None
    soft_cross_entropy(student, p).backward()
    assert torch.allclose(student.grad, q - p)
    # ruled out on both sides, as where logits are clipped to a set of classes
    for divergence in DIVERGENCES:
        both = torch.tensor([[0.5, 0.0, -INF]], dtype=torch.float64, requires_grad=True)
        value = divergence(both, teacher)
        value.backward()
        assert torch.isclose(value, divergence(both[:, :2], teacher[:, :2])) and torch.isfinite(both.grad).all() and both.grad[0, 2] == 0


def test_extreme_logits_stay_finite():
    student, teacher = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True), torch.tensor([[-1e4, 0.0, 1e4]])
    for divergence in DIVERGENCES:
        student.grad = None
        value = divergence(student, teacher)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(student.grad).all(), divergence.__name__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_softmaxes_run_in_at_least_float32(dtype):
    student, teacher = (x.to(dtype).requires_grad_() for x in pair((8, 300), 4, scale=5.0))
    for divergence in DIVERGENCES:
        value = divergence(student, teacher, temperature=2.0)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert math.isclose(value.item(), divergence(student.double(), teacher.double(), temperature=2.0).item(), rel_tol=1e-5)
    value.backward()
    assert student.grad.dtype == dtype
    assert cross_entropy(student, torch.zeros(8, dtype=torch.int64)).dtype == value.dtype
    assert forward_kl(student, teacher.double()).dtype == torch.float64


def test_temperature_may_be_a_tensor_and_learned():
    student, teacher = pair((3, 4), 8)
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda tau: forward_kl(student, teacher, temperature=tau), (temperature,))


@quick
@given(seeds, st.floats(0, 1), st.floats(0.5, 8.0))
def test_soft_target_loss_is_its_definition(seed, alpha, temperature):
    student, teacher = pair((2, 3, 4), seed)
    labels = torch.tensor([[0, -100, 3], [1, 2, -100]])
    counted = labels != -100
    kl = forward_kl(student[counted], teacher[counted], temperature=temperature)
    expected = alpha * F.cross_entropy(student[counted], labels[counted]) + (1 - alpha) * temperature**2 * kl
    assert torch.isclose(soft_target_loss(student, teacher, labels, alpha=alpha, temperature=temperature), expected)


def test_soft_target_loss_without_labels_is_zero_and_ends_are_pure():
    student, teacher = pair((2, 4), 1)
    assert soft_target_loss(student, teacher, torch.full((2,), -100), alpha=0.5, temperature=2.0) == 0
    labels = torch.tensor([1, 2])
    assert torch.isclose(soft_target_loss(student, teacher, labels, alpha=1.0, temperature=3.0), cross_entropy(student, labels))
    assert torch.isclose(soft_target_loss(student, teacher, labels, alpha=0.0, temperature=3.0), 9 * forward_kl(student, teacher, temperature=3.0))


def test_ensembles():
    a, b = randn(2, 3, seed=1), randn(2, 3, seed=2).requires_grad_()
    mean = ensemble_probabilities([a, b], temperature=2.0)
    assert torch.allclose(mean, ((a / 2).softmax(-1) + (b / 2).softmax(-1)) / 2) and not mean.requires_grad
    assert torch.allclose(ensemble_probabilities([a, b], weights=torch.tensor([3.0, 1.0])), 0.75 * a.softmax(-1) + 0.25 * b.softmax(-1))
    assert torch.allclose(ensemble_probabilities(torch.stack([a, b.detach()])), ensemble_probabilities([a, b]))
    assert torch.allclose(forward_kl(a, mean.log()), forward_kl(a, mean.log() + 5))  # log-probabilities are logits


# ---------------------------------------------------------------- hidden states
@quick
@given(seeds, st.sampled_from(["mse", "sse", "mae", "l2", "cosine"]), st.booleans())
def test_hidden_distances_against_their_definition(seed, kind, normalize):
    s, t = randn(2, 3, 4, seed=seed), randn(2, 3, 4, seed=seed + 1)
    a, b = (F.normalize(s, dim=-1), F.normalize(t, dim=-1)) if normalize else (s, t)
    expected = {"mse": ((a - b) ** 2).mean(-1), "sse": ((a - b) ** 2).sum(-1), "mae": (a - b).abs().mean(-1), "l2": (a - b).norm(dim=-1),
                "cosine": 1 - F.cosine_similarity(a, b, dim=-1)}[kind]
    assert torch.allclose(hidden_distance(s, t, kind=kind, normalize=normalize, reduction="none"), expected)
    mask, weights = randn(2, 3, seed=seed + 2) > -1, randn(2, 3, seed=seed + 3).abs()
    value = hidden_distance(torch.where(mask[..., None], s, NAN), t, kind=kind, normalize=normalize, mask=mask, weights=weights)
    assert torch.isclose(value, masked_mean(expected, mask, weights=weights))


@pytest.mark.parametrize("kind", ["mse", "sse", "mae", "l2", "cosine"])
def test_hidden_distances_have_finite_gradients_at_zero_and_equality(kind):
    for s, t in ((torch.zeros(2, 3), torch.zeros(2, 3)), (torch.zeros(2, 3), torch.ones(2, 3)), (torch.ones(2, 3), torch.ones(2, 3))):
        s = s.clone().requires_grad_()
        hidden_distance(s, t, kind=kind).backward()
        assert torch.isfinite(s.grad).all() and s.grad.abs().max() < 10
    s, t = (randn(2, 3, seed=k).requires_grad_() for k in (1, 2))
    assert gradcheck(lambda a, b: hidden_distance(a, b, kind=kind), (s, t))
    masked = torch.full((2, 3), INF, requires_grad=True)
    hidden_distance(masked, torch.ones(2, 3), kind=kind, mask=torch.zeros(2, dtype=torch.bool)).backward()
    assert not masked.grad.any()


def test_hidden_names_and_dtype():
    s, t = randn(4, 3, seed=1), randn(4, 3, seed=2)
    assert hidden_mse(s, t) == F.mse_loss(s, t) and torch.isclose(hidden_cosine(s, t), hidden_distance(s, t, kind="cosine"))
    assert hidden_mse(s.bfloat16(), t.bfloat16()).dtype == torch.float32
    assert hidden_mse(s, t, mask=torch.zeros(4, dtype=torch.bool)) == 0


# ---------------------------------------------------------------- relations
@quick
@given(seeds)
def test_similarity(seed):
    a, b = randn(2, 4, 3, seed=seed), randn(2, 5, 3, seed=seed + 1)
    cosines = similarity(a, b)
    assert cosines.shape == (2, 4, 5) and torch.allclose(cosines, F.cosine_similarity(a[:, :, None], b[:, None], dim=-1))
    assert torch.allclose(similarity(a, normalize=False), a @ a.transpose(1, 2))
    assert torch.allclose(similarity(a).diagonal(dim1=1, dim2=2), torch.ones(2, 4, dtype=torch.float64))
    assert not similarity(torch.zeros(2, 3), b[0]).any()


def test_attention_kl_against_a_loop_and_padding():
    scores_s, scores_t = randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2)
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    hide = lambda x: x.masked_fill(~mask[:, None, None], -INF).log_softmax(-1)
    student, teacher = hide(scores_s).requires_grad_(), hide(scores_t)
    total = []
    for b in range(2):
        keys = int(mask[b].sum())
        for a in range(3):
            for t in range(keys):
                p, q = teacher[b, a, t, :keys].exp(), student[b, a, t, :keys].exp()
                total.append((p * (p / q).log()).sum())
    value = attention_kl(student, teacher, mask)
    assert torch.isclose(value, torch.stack(total).mean())
    value.backward()
    assert torch.isfinite(student.grad[student > -INF]).all()
    garbage = torch.where(mask[:, None, :, None], student, NAN)  # rows of padded queries
    assert torch.isclose(attention_kl(garbage, teacher, mask), value)
    assert attention_kl(student, student.detach(), mask) == 0
    assert torch.isclose(attention_kl(scores_s.log_softmax(-1), scores_t.log_softmax(-1)), forward_kl(scores_s, scores_t))


@quick
@given(seeds)
def test_linear_cka(seed):
    a, b = randn(12, 5, seed=seed, dtype=torch.float32), randn(12, 3, seed=seed + 1, dtype=torch.float32)
    rotation = torch.linalg.qr(randn(5, 5, seed=seed, dtype=torch.float32)).Q
    value = linear_cka(a, b)
    assert value.dtype == torch.float64 and 0 <= value <= 1 and math.isclose(linear_cka(b, a), value)
    assert math.isclose(linear_cka(3 * a @ rotation + 7, b), value, rel_tol=1e-4) and math.isclose(linear_cka(a, a), 1, rel_tol=1e-9)
    k, l = (x.double() - x.double().mean(0) for x in (a, b))
    assert torch.isclose(value, F.cosine_similarity((k @ k.T).flatten(), (l @ l.T).flatten(), dim=0))
    assert linear_cka(torch.ones(4, 2), randn(4, 2)) == 0


def test_relational_losses_against_loops():
    student, teacher = randn(5, 3, seed=1), randn(5, 4, seed=2)

    def distances(x):
        d = torch.stack([torch.stack([(x[i] - x[j]).norm() for j in range(5)]) for i in range(5)])
        return d / d[d > 0].mean()

    def angles(x):
        unit = lambda v: v / v.norm() if v.norm() > 0 else v
        return torch.stack([unit(x[j] - x[i]) @ unit(x[k] - x[i]) for i in range(5) for j in range(5) for k in range(5)])

    assert torch.isclose(rkd_distance_loss(student, teacher), F.smooth_l1_loss(distances(student), distances(teacher)))
    assert torch.isclose(rkd_angle_loss(student, teacher), F.smooth_l1_loss(angles(student), angles(teacher)))


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
def test_relational_losses_are_invariant_and_differentiable(loss):
    x = randn(6, 3, seed=3)
    rotation = torch.linalg.qr(randn(3, 3, seed=4)).Q
    assert loss(x, x) == 0 and loss(2.5 * x @ rotation + 1, x) < 1e-12
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    y = randn(6, 2, seed=5)
    assert torch.isclose(loss(x[order], y[order]), loss(x, y))
    assert gradcheck(loss, (randn(4, 2, seed=6).requires_grad_(), randn(4, 3, seed=7).requires_grad_()))
    same = torch.ones(3, 2, requires_grad=True)  # all points in one place: nothing to scale by
    value = loss(same, randn(3, 2, dtype=torch.float32))
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(same.grad).all()


# ---------------------------------------------------------------- contrast
@quick
@given(seeds, st.floats(0.05, 2.0))
def test_info_nce_against_a_loop(seed, temperature):
    queries, keys = randn(4, 3, seed=seed), randn(6, 3, seed=seed + 1)
    targets = torch.tensor([5, 0, -100, 2])
    candidates = randn(4, 6, seed=seed + 2) > 0
    terms = []
    for i in range(4):
        if targets[i] == -100:
            continue
        s = torch.stack([F.cosine_similarity(queries[i], keys[j], dim=0) / temperature for j in range(6)])
        allowed = [j for j in range(6) if candidates[i, j] or j == targets[i]]
        terms.append(s[allowed].exp().sum().log() - s[targets[i]])
    value = info_nce(queries, keys, targets, temperature=temperature, candidates=candidates)
    assert torch.isclose(value, torch.stack(terms).mean())


def test_info_nce_options():
    u, v = randn(4, 3, seed=1), randn(4, 3, seed=2)
    assert torch.isclose(info_nce(u, v, symmetric=True), (info_nce(u, v) + info_nce(v, u)) / 2)
    assert torch.isclose(info_nce(u, v, torch.arange(4)), info_nce(u, v))
    assert torch.isclose(info_nce(F.normalize(u, dim=-1), F.normalize(v, dim=-1), normalize=False), info_nce(u, v))
    assert torch.isclose(info_nce(u, torch.cat([v, u])), cross_entropy(similarity(u, torch.cat([v, u])) / 0.07, torch.arange(4)))
    batch = torch.stack([u, v]), torch.stack([v, u])
    assert torch.isclose(info_nce(*batch), (info_nce(u, v) + info_nce(v, u)) / 2)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.isclose(info_nce(u[order], v[order]), info_nce(u, v))
    candidates = randn(4, 4, seed=3) > 0
    both = (info_nce(u, v, candidates=candidates) + info_nce(v, u, candidates=candidates.T)) / 2
    assert torch.isclose(info_nce(u, v, symmetric=True, candidates=candidates), both)
    assert gradcheck(lambda a, b: info_nce(a, b, candidates=candidates, symmetric=True), (u.requires_grad_(), v.requires_grad_()))
    assert info_nce(torch.zeros(0, 3), v.float()) == 0


def naive_contrast(scores, positives, candidates, anchors, denominator, average):
    per_anchor, pairs = [], []
    n, m = scores.shape
    for i in range(n):
        if not anchors[i]:
            continue
        terms = []
        for p in range(m):
            if not positives[i, p]:
                continue
            others = [j for j in range(m) if (candidates[i, j] or positives[i, j] if denominator == "all" else candidates[i, j] and not positives[i, j])]
            z = sum((scores[i, j].exp() for j in others), scores[i, p].exp() if denominator == "own" else 0)
            terms.append(z.log() - scores[i, p])
        if terms:
            per_anchor.append(sum(terms) / len(terms))
            pairs += terms
    values = per_anchor if average == "anchors" else pairs
    return sum(values) / len(values) if values else torch.tensor(0.0, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from(["all", "own"]), st.sampled_from(["anchors", "pairs"]))
def test_contrastive_loss_against_a_loop(seed, denominator, average):
    scores = randn(5, 4, seed=seed).requires_grad_()
    positives, candidates, anchors = randn(5, 4, seed=seed + 1) > 0.5, randn(5, 4, seed=seed + 2) > -0.5, randn(5, seed=seed + 3) > -1
    options = dict(candidates=candidates, anchors=anchors, denominator=denominator, average=average)
    value = contrastive_loss(scores, positives, **options)
    assert torch.isclose(value, naive_contrast(scores, positives, candidates, anchors, denominator, average))
    value.backward()
    assert torch.isfinite(scores.grad).all()
    unused = ~(positives | candidates)
    assert torch.isclose(contrastive_loss(torch.where(unused, NAN, scores.detach()), positives, **options), value.detach())


@pytest.mark.parametrize("denominator", ["all", "own"])
def test_contrastive_loss_in_special_cases(denominator):
    s = randn(4, 4, seed=9)
    eye = torch.eye(4, dtype=torch.bool)
    assert torch.isclose(contrastive_loss(s, eye, denominator=denominator), cross_entropy(s, torch.arange(4)))
    assert torch.isclose(contrastive_loss(s.expand(3, 4, 4), eye, denominator=denominator), cross_entropy(s, torch.arange(4)))
    alone = s.clone().requires_grad_()  # a positive without any negative costs nothing
    value = contrastive_loss(alone, eye, candidates=eye, denominator=denominator)
    value.backward()
    assert value == 0 and not alone.grad.any()
    assert contrastive_loss(s, eye & False, denominator=denominator) == 0
    with pytest.raises(ValueError, match="nothing counts"):
        contrastive_loss(s, eye, anchors=torch.zeros(4, dtype=torch.bool), denominator=denominator, empty="error")
    positives = torch.tensor([[True, True, False, False]] * 4)
    assert gradcheck(lambda x: contrastive_loss(x, positives, denominator=denominator), (s.requires_grad_(),))


def test_supcon_and_nt_xent_differ_only_with_three_or_more_of_a_class():
    x = randn(6, 4, seed=11)
    for labels, equal in ((torch.tensor([0, 0, 1, 1, 2, 2]), True), (torch.tensor([0, 0, 0, 1, 1, 1]), False)):
        same, eye = labels[:, None] == labels, torch.eye(6, dtype=torch.bool)
        supcon = contrastive_loss(similarity(x) / 0.5, same & ~eye, candidates=~eye)
        assert torch.isclose(supcon, nt_xent(x, labels, 0.5)) == equal


def test_mutual_information_estimate_of_distiller():
    scores = randn(5, 5, seed=2)  # alpha = 1: log K minus the column-wise contrastive loss
    direct = (scores.diagonal() - scores.logsumexp(0)).mean() + math.log(5)
    assert torch.isclose(math.log(5) - contrastive_loss(scores.T, torch.eye(5, dtype=torch.bool)), direct)


# ---------------------------------------------------------------- refusals
z23, y2 = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
m2 = torch.ones(2, dtype=torch.bool)


@pytest.mark.parametrize("call, message", [
    (lambda: masked_mean(z23, m2), r"mask must be a bool tensor of shape \(2, 3\), got torch.bool of shape \(2,\)"),
    (lambda: masked_mean(z23, z23), r"mask must be a bool tensor of shape \(2, 3\), got torch.float32"),
    (lambda: masked_mean(z23, weights=torch.ones(3)), r"weights must have shape \(2, 3\), got \(3,\)"),
    (lambda: masked_mean(z23, empty="nan"), r"empty must be one of 'zero', 'error', got 'nan'"),
    (lambda: token_log_probs(z23, torch.zeros(3, dtype=torch.int64)), r"labels must have shape \(2,\), got \(3,\)"),
    (lambda: token_log_probs(z23, torch.zeros(2)), r"labels must be int64, got torch.float32"),
    (lambda: token_log_probs(z23, torch.tensor([0, 3])), r"labels must be -100 or in \[0, 3\), got 3"),
    (lambda: token_log_probs(z23, torch.tensor([0, -1])), r"labels must be -100 or in \[0, 3\), got -1"),
    (lambda: token_log_probs(torch.zeros(3), torch.tensor(0), shift=True), r"logits must have shape \(..., T, V\)"),
    (lambda: cross_entropy(z23, y2, label_smoothing=1.5), r"label_smoothing must be in \[0, 1\], got 1.5"),
    (lambda: cross_entropy(z23, y2, weights=torch.ones(2, 1)), r"weights must have shape \(2,\), got \(2, 1\)"),
    (lambda: forward_kl(z23, torch.zeros(2, 4)), r"share one vocabulary, got 3 and 4 classes"),
    (lambda: forward_kl(z23, torch.zeros(1, 3)), r"teacher_logits must have shape \(2, 3\), got \(1, 3\)"),
    (lambda: forward_kl(torch.tensor(0.0), torch.tensor(0.0)), r"student_logits must have shape"),
    (lambda: reverse_kl(z23, z23, temperature=0.0), r"temperature must be > 0, got 0.0"),
    (lambda: total_variation(z23, z23, temperature=NAN), r"temperature must be > 0, got nan"),
    (lambda: jsd(z23, z23, beta=1.5), r"beta must be in \[0, 1\], got 1.5"),
    (lambda: skew_kl(z23, z23, alpha=-0.1), r"alpha must be in \[0, 1\], got -0.1"),
    (lambda: skew_reverse_kl(z23, z23, mask=torch.ones(2)), r"mask must be a bool tensor of shape \(2,\), got torch.float32"),
    (lambda: forward_kl(z23, z23, mask=torch.ones(2, 1, dtype=torch.bool)), r"mask must be a bool tensor of shape \(2,\), got torch.bool of shape \(2, 1\)"),
    (lambda: forward_kl(z23, z23, reduction="sum"), r"reduction must be one of 'mean', 'none', got 'sum'"),
    (lambda: soft_cross_entropy(z23, torch.ones(3)), r"target_probs must have shape \(2, 3\), got \(3,\)"),
    (lambda: soft_cross_entropy(z23, z23, weights=torch.ones(2), reduction="none"), r"weights act in the mean only"),
    (lambda: soft_target_loss(z23, z23, y2, alpha=2, temperature=1.0), r"alpha must be in \[0, 1\], got 2"),
    (lambda: soft_target_loss(z23, z23, torch.zeros(3, dtype=torch.int64), alpha=0.5, temperature=1.0), r"labels must have shape \(2,\), got \(3,\)"),
    (lambda: ensemble_probabilities([]), r"logits must hold at least one teacher"),
    (lambda: ensemble_probabilities([z23, torch.zeros(2, 4)]), r"must have shape \(2, 3\), got \(2, 4\)"),
    (lambda: ensemble_probabilities([z23, z23], weights=[1.0]), r"weights must be 2 numbers >= 0"),
    (lambda: ensemble_probabilities([z23, z23], weights=[1.0, -1.0]), r"weights must be 2 numbers >= 0"),
    (lambda: ensemble_probabilities([z23], temperature=-1), r"temperature must be > 0, got -1"),
    (lambda: hidden_distance(z23, torch.zeros(2, 4)), r"teacher_hidden must have shape \(2, 3\), got \(2, 4\)"),
    (lambda: hidden_distance(z23, z23, kind="rmse"), r"kind must be one of 'mse', 'sse', 'mae', 'l2', 'cosine', got 'rmse'"),
    (lambda: hidden_mse(z23, z23, mask=torch.ones(2, 3, dtype=torch.bool)), r"mask must be a bool tensor of shape \(2,\)"),
    (lambda: similarity(torch.zeros(3)), r"a and b must have shapes \(..., N, D\)"),
    (lambda: similarity(torch.zeros(1, 2, 3), torch.zeros(2, 2, 3)), r"a and b must have shapes"),
    (lambda: attention_kl(z23, z23), r"student_log_attention must have shape \(B, A, T, T\)"),
    (lambda: attention_kl(torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 3, 3)), r"teacher_log_attention must have shape \(1, 2, 3, 3\)"),
    (lambda: attention_kl(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, dtype=torch.bool)), r"mask must be a bool tensor of shape \(1, 3\)"),
    (lambda: linear_cka(z23, torch.zeros(3, 3)), r"with N >= 2, got \(2, 3\) and \(3, 3\)"),
    (lambda: linear_cka(torch.zeros(1, 3), torch.zeros(1, 3)), r"with N >= 2"),
    (lambda: rkd_distance_loss(z23, torch.zeros(3, 3)), r"student and teacher must have shapes"),
    (lambda: rkd_angle_loss(torch.zeros(2, 3, 1), z23), r"student and teacher must have shapes"),
    (lambda: info_nce(z23, z23, temperature=0), r"temperature must be > 0, got 0"),
    (lambda: info_nce(z23, torch.zeros(1, 3)), r"keys must hold at least one key for each of the 2 queries"),
    (lambda: info_nce(z23, z23, y2, symmetric=True), r"symmetric must be used without targets"),
    (lambda: info_nce(z23, torch.zeros(3, 3), symmetric=True), r"symmetric must be used .* got 2 queries, 3 keys"),
    (lambda: info_nce(z23, z23, torch.tensor([0, 2])), r"labels must be -100 or in \[0, 2\), got 2"),
    (lambda: info_nce(z23, z23, torch.zeros(3, dtype=torch.int64)), r"targets must have shape"),
    (lambda: info_nce(z23, z23, candidates=torch.ones(2, 3, dtype=torch.bool)), r"candidates must be a bool tensor of shape \(2, 2\)"),
    (lambda: contrastive_loss(torch.zeros(3), torch.ones(3, dtype=torch.bool)), r"scores must have shape \(..., N, M\)"),
    (lambda: contrastive_loss(z23, torch.ones(2, 3)), r"positives must be a bool tensor of shape \(2, 3\), got torch.float32"),
    (lambda: contrastive_loss(z23, torch.ones(2, 3, dtype=torch.bool), anchors=torch.ones(3, dtype=torch.bool)), r"anchors must be a bool tensor of shape \(2,\)"),
    (lambda: contrastive_loss(z23, torch.ones(2, 3, dtype=torch.bool), denominator="none"), r"denominator must be one of 'all', 'own'"),
    (lambda: contrastive_loss(z23, torch.ones(2, 3, dtype=torch.bool), average="rows"), r"average must be one of 'anchors', 'pairs'"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_all_names_come_from_one_module():
    assert losses.info_nce is representations.info_nce and losses.linear_cka is representations.linear_cka
    namespace = {}
    exec("from kdbook.losses import *", namespace)
    assert {"forward_kl", "masked_mean", "contrastive_loss", "hidden_cosine", "rkd_angle_loss"} <= namespace.keys()
    with pytest.raises(AttributeError, match="no_such_loss"):
        losses.no_such_loss


@pytest.mark.parametrize("module", ["losses", "representations"])
def test_every_public_function_says_what_it_returns(module):
    module = importlib.import_module(f"kdbook.{module}")
    for name in module.__all__:
        documentation = getattr(module, name).__doc__
        assert documentation and documentation.split("\n")[0].rstrip().endswith((".", "options.")), name
