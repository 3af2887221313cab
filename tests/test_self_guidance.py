"""The chapter on self-distillation with the labels mixed back in: golden numbers, the limit, linearity, diagonals, losses and every error."""
import inspect
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbook.selfdistill import self_guidance
from kdbook.selfdistill.self_guidance import KernelSelfDistiller, distillation_diagonals, guided_distillation_loss, optimal_alpha


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def distiller(n=7, c=3, ridge=0.2, gamma=1.0, seed=0):
    return KernelSelfDistiller(normal(n, 2, seed=seed), normal(n, c, seed=seed + 1), ridge=ridge, gamma=gamma)


def decode(value):
    return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"])) if isinstance(value, dict) and "tensor" in value else value


def test_golden_numbers(shared):
    for case in json.loads((shared / "golden/selfdistill/self_guidance.json").read_text())["cases"]:
        call = getattr(self_guidance, case["call"].rsplit(".", 1)[1])
        result = call(*map(decode, case["args"]), **{name: decode(value) for name, value in case["kwargs"].items()})
        checks = [(result, case["expect"])] if "expect" in case else []
        for method in case.get("then", []):
            checks.append((getattr(result, method["method"])(*map(decode, method["args"]), **method.get("kwargs", {})), method["expect"]))
        assert checks
        for got, expected in checks:
            torch.testing.assert_close(got, torch.as_tensor(decode(expected), dtype=got.dtype), rtol=case["rtol"], atol=case["atol"], msg=case["name"])


def test_signatures():
    def names(function):
        return [f"{p.kind.name[:1]}{'W' if p.kind is p.KEYWORD_ONLY else ''} {name}" for name, p in inspect.signature(function).parameters.items()]
    assert names(KernelSelfDistiller.__init__) == ["P self", "P x", "P y", "KW ridge", "KW gamma"]
    assert names(KernelSelfDistiller.fit) == ["P self", "P alpha", "P steps"]
    assert names(KernelSelfDistiller.predict) == ["P self", "P x", "P step"]
    assert names(KernelSelfDistiller.limit) == ["P self", "P x", "P alpha"]
    assert names(distillation_diagonals) == ["P eigenvalues", "P ridge", "KW alpha", "KW steps"]
    assert names(optimal_alpha) == ["P labels", "P first_predictions", "P previous_predictions"]
    assert names(guided_distillation_loss) == ["P student_logits", "P teacher_logits", "P labels", "KW alpha"]


def test_each_step_is_a_ridge_fit_to_the_mixed_target():
    model = distiller()
    predictions = model.fit(0.3, 4)
    smoother = model.kernel @ torch.linalg.inv(model.kernel + 0.2 * torch.eye(7, dtype=torch.float64))
    target = model.y
    for step in range(4):
        assert torch.allclose(predictions[step], smoother @ target)
        assert torch.allclose(model.predict(model.x, step + 1), predictions[step])
        target = 0.3 * model.y + 0.7 * predictions[step]


def test_alpha_one_repeats_the_first_fit_and_the_first_step_ignores_alpha():
    model = distiller()
    ones = model.fit(1.0, 3)
    assert torch.equal(ones[0], ones[2])
    for alpha in (0.0, 0.4, -2.0, [float("nan"), 0.5, 0.5]):
        assert torch.equal(model.fit(alpha, 3)[0], ones[0])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.floats(0.05, 1.0), st.floats(0.05, 5.0), st.integers(0, 1000))
def test_the_limit_is_reached_and_is_one_fit_with_a_larger_ridge(n, alpha, ridge, seed):
    model = distiller(n, ridge=ridge, seed=seed)
    new = normal(4, 2, seed=seed + 2)
    steps = 600
    model.fit(alpha, steps)
    limit = model.limit(new, alpha)
    assert (model.predict(new, steps) - limit).abs().max() < 1e-4
    plain = KernelSelfDistiller(model.x, model.y, ridge=ridge / alpha, gamma=1.0)
    plain.fit(1.0, 1)
    assert torch.allclose(plain.predict(new, 1), limit, atol=1e-9)


def test_the_limit_at_the_ends():
    model = distiller()
    assert torch.equal(model.limit(model.x, 0.0), torch.zeros(7, 3, dtype=torch.float64))  # without having been fitted
    model.fit(0.0, 1)
    assert torch.allclose(model.limit(model.x, 1.0), model.predict(model.x, 1))
    model.fit(0.0, 3000)
    assert model.predict(model.x, 3000).abs().max() < 1e-3


@settings(max_examples=30, deadline=None)
@given(st.floats(-3, 3), st.integers(2, 5), st.integers(0, 1000))
def test_a_step_is_linear_in_its_alpha(alpha, step, seed):
    model, before = distiller(seed=seed), [0.5, 0.2, 0.7, -0.1][:step - 1]
    new = normal(3, 2, seed=seed + 2)

    def at(weight):
        model.fit([*before, weight], step)
        return model.predict(new, step)
    assert torch.allclose(at(alpha), alpha * at(1.0) + (1 - alpha) * at(0.0), atol=1e-9)
    model.fit(1.0, 1)
    assert torch.allclose(at(1.0), model.predict(new, 1), atol=1e-12)


def test_a_list_uses_its_entries_in_order():
    model = distiller()
    assert torch.equal(model.fit([0.3, 0.3, 0.3], 3), model.fit(0.3, 3))
    mixed = model.fit([9.0, 0.0, 1.0], 3)
    assert torch.equal(mixed[2], mixed[0]) and not torch.allclose(mixed[1], mixed[0])
    assert torch.equal(model.fit((9.0, 0.0, 1.0), 3), mixed)
    assert torch.equal(model.fit(torch.tensor([9.0, 0.0, 1.0]), 3), mixed)
    assert torch.equal(model.fit(torch.tensor(0.5), 3), model.fit(0.5, 3))


def test_negative_and_large_alphas_are_allowed_in_fit():
    model = distiller()
    for alpha in (-1.3, 2.7):
        predictions = model.fit(alpha, 2)
        alone = model.fit(0.0, 2)
        assert torch.allclose(predictions[1], alpha * alone[0] + (1 - alpha) * alone[1])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0, -0.5])
def test_diagonals_agree_with_the_matrices(alpha):
    model = distiller(n=9)
    eigenvalues, patterns = torch.linalg.eigh(model.kernel)
    diagonals = distillation_diagonals(eigenvalues, 0.2, alpha=alpha, steps=5)
    assert diagonals.shape == (5, 9)
    matrices = patterns @ torch.diag_embed(diagonals) @ patterns.T
    assert torch.allclose(matrices @ model.y, model.fit(alpha, 5))


def test_diagonals_without_labels_are_powers_whose_ratios_grow():
    eigenvalues = torch.tensor([4.0, 2.0, 1.0, 0.1, 0.0])
    diagonals = distillation_diagonals(eigenvalues, 0.5, alpha=0.0, steps=6)
    kept = eigenvalues / (eigenvalues + 0.5)
    assert torch.allclose(diagonals, kept ** torch.arange(1, 7)[:, None])
    ratios = diagonals[:, :3] / diagonals[:, 1:4]
    assert (ratios.diff(dim=0) > 0).all() and (diagonals[:, 4] == 0).all()
    assert diagonals.dtype == torch.float32


def test_the_distance_to_the_limit_shrinks_at_the_rate_of_the_theory():
    eigenvalues = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    limit = 0.3 * eigenvalues / (0.3 * eigenvalues + 0.4)
    distance = (distillation_diagonals(eigenvalues, 0.4, alpha=0.3, steps=20) - limit).abs()
    rate = 0.7 * (eigenvalues / (eigenvalues + 0.4)).max()
    assert (distance[1:].amax(1) <= rate * distance[:-1].amax(1) + 1e-12).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 1000))
def test_optimal_alpha_is_the_minimum_of_the_held_out_error(m, c, seed):
    labels, first, previous = normal(3, m, c, seed=seed)
    best = optimal_alpha(labels, first, previous)
    assert best.shape == ()

    def error(alpha):
        return (labels - alpha * first - (1 - alpha) * previous).square().sum()
    assert all(error(best) <= error(best + change) for change in (-0.1, -1e-3, 1e-3, 0.1))


def test_optimal_alpha_edge_cases():
    labels, same = normal(4, 2), normal(4, 2, seed=1)
    assert optimal_alpha(labels, same, same) == 1
    assert optimal_alpha(labels, labels, same) == 1  # the first fit is right
    assert optimal_alpha(labels, same, labels).abs() < 1e-12  # the distilled one is right
    assert optimal_alpha(labels, 2 * labels, 1.5 * labels).item() == pytest.approx(-1)  # past the teacher
    assert optimal_alpha(labels.float(), same.float(), labels.float()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"same shape, got \(4, 2\), \(4, 1\) and \(4, 1\)"):
        optimal_alpha(labels, same[:, :1], same[:, :1])


@pytest.mark.parametrize("seed", range(5))
def test_on_the_training_points_the_optimal_alpha_is_above_one(seed):
    model = distiller(seed=seed)
    assert optimal_alpha(model.y, *model.fit([1.0, 0.0], 2)) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_x_is_kept(dtype):
    model = KernelSelfDistiller(normal(5, 2, dtype=dtype), normal(5, 1, dtype=torch.float64), ridge=0.1, gamma=1.0)
    assert model.fit([1.0, 0.2], 2).dtype == dtype
    assert model.predict(normal(3, 2, dtype=torch.float64), 2).dtype == dtype
    assert model.limit(normal(3, 2, dtype=torch.float32), 0.5).dtype == dtype


def test_one_dimensional_targets_are_one_column():
    x, y = normal(5, 2), normal(5, seed=1)
    flat, column = KernelSelfDistiller(x, y, ridge=0.1, gamma=1.0), KernelSelfDistiller(x, y[:, None], ridge=0.1, gamma=1.0)
    assert flat.fit(0.5, 3).shape == (3, 5, 1) and torch.equal(flat.fit(0.5, 3), column.fit(0.5, 3))
    assert flat.predict(x[:2], 1).shape == (2, 1) and flat.limit(x[:2], 0.5).shape == (2, 1)
    integers = KernelSelfDistiller(x, torch.arange(5), ridge=0.1, gamma=1.0)
    assert integers.fit(0.5, 1).dtype == torch.float64


def test_errors_of_the_distiller():
    x, y = normal(4, 2), normal(4, 3)
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="ridge must be > 0, got"):
            KernelSelfDistiller(x, y, ridge=ridge, gamma=1.0)
    with pytest.raises(ValueError, match="gamma must be > 0, got 0"):
        KernelSelfDistiller(x, y, ridge=1.0, gamma=0)
    with pytest.raises(ValueError, match=r"n = 4 rows like x, got shape \(3, 3\)"):
        KernelSelfDistiller(x, y[:3], ridge=1.0, gamma=1.0)
    with pytest.raises(ValueError, match="y must be"):
        KernelSelfDistiller(x, y[None], ridge=1.0, gamma=1.0)
    for wrong in (x[0], torch.ones(4, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="x must be"):
            KernelSelfDistiller(wrong, y, ridge=1.0, gamma=1.0)


def test_errors_of_fit_and_predict():
    model = distiller()
    with pytest.raises(ValueError, match="got 1 before fit was called"):
        model.predict(model.x, 1)
    for steps in (0, -1):
        with pytest.raises(ValueError, match="steps must be at least 1, got"):
            model.fit(0.5, steps)
    for alphas in ([0.5], [0.5] * 3, []):
        with pytest.raises(ValueError, match="steps = 2 numbers, got"):
            model.fit(alphas, 2)
    with pytest.raises(ValueError, match="alpha must be finite"):
        model.fit(float("nan"), 2)
    model.fit(0.5, 2)
    for step in (0, 3, -1):
        with pytest.raises(ValueError, match=f"between 1 and 2, got {step}"):
            model.predict(model.x, step)
    with pytest.raises(ValueError):
        model.fit([0.1], 4)
    assert model.predict(model.x, 2).shape == (7, 3)  # a refused call leaves the earlier fit as it was
    model.fit(0.5, 1)
    with pytest.raises(ValueError, match="between 1 and 1, got 2"):
        model.predict(model.x, 2)
    with pytest.raises(ValueError, match="same d"):
        model.predict(torch.ones(2, 5), 1)
    for alpha in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got"):
            model.limit(model.x, alpha)


def test_errors_of_the_diagonals():
    with pytest.raises(ValueError, match="ridge must be > 0, got 0"):
        distillation_diagonals(torch.ones(3), 0, alpha=0.5, steps=2)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        distillation_diagonals(torch.ones(3), 1.0, alpha=0.5, steps=0)
    with pytest.raises(ValueError, match=r"eigenvalues must be \(n,\), got shape \(3, 3\)"):
        distillation_diagonals(torch.ones(3, 3), 1.0, alpha=0.5, steps=1)


def test_loss_is_the_weighted_mean_square_over_rows_and_classes():
    student, teacher, labels = normal(2, 3, 5), normal(2, 3, 5, seed=1), torch.tensor([[0, 4, -100], [2, -100, 1]])
    q, p, counted = student.softmax(-1), teacher.softmax(-1), labels != -100
    truth = torch.nn.functional.one_hot(labels.clamp_min(0), 5).double()
    for alpha in (0.0, 0.3, 1.0):
        expected = alpha * (q - truth)[counted].square().mean() + (1 - alpha) * (q - p)[counted].square().mean()
        assert torch.allclose(guided_distillation_loss(student, teacher, labels, alpha=alpha), expected)


def test_alpha_weighs_the_labels():
    student, labels = torch.tensor([[30.0, 0.0]]), torch.tensor([0])
    teacher = torch.tensor([[0.0, 30.0]])
    assert guided_distillation_loss(student, teacher, labels, alpha=1.0) < 1e-6
    assert guided_distillation_loss(student, teacher, labels, alpha=0.0) > 0.9


def test_loss_detaches_the_teacher_and_gives_the_gradient_of_one_mixed_target():
    student, teacher = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    labels = torch.tensor([0, 1, 2, 0])
    guided_distillation_loss(student, teacher, labels, alpha=0.4).backward()
    assert teacher.grad is None
    mixed = 0.4 * torch.nn.functional.one_hot(labels, 3) + 0.6 * teacher.detach().softmax(-1)
    expected, = torch.autograd.grad((student.softmax(-1) - mixed).square().mean(), student)
    assert torch.allclose(student.grad, expected)


def test_ignored_rows_may_hold_anything():
    student, teacher, labels = normal(3, 4).requires_grad_(), normal(3, 4, seed=1), torch.tensor([1, -100, 2])
    spoilt, broken = student.detach().clone(), teacher.clone()
    spoilt[1], broken[1] = float("nan"), float("inf")
    spoilt.requires_grad_()
    loss = guided_distillation_loss(spoilt, broken, labels, alpha=0.5)
    assert torch.equal(loss, guided_distillation_loss(student, teacher, labels, alpha=0.5))
    loss.backward()
    assert spoilt.grad.isfinite().all() and (spoilt.grad[1] == 0).all()


def test_nothing_counted_gives_zero_with_a_gradient_path():
    student = normal(2, 3).requires_grad_()
    loss = guided_distillation_loss(student, student, torch.full((2,), -100), alpha=0.5)
    loss.backward()
    assert loss == 0 and (student.grad == 0).all()


def test_half_precision_logits_are_raised_to_float32():
    student, teacher, labels = normal(3, 4), normal(3, 4, seed=1), torch.tensor([1, 0, 2])
    half = guided_distillation_loss(student.bfloat16(), teacher.bfloat16(), labels, alpha=0.5)
    assert half.dtype == torch.float32
    assert half == guided_distillation_loss(student.bfloat16().float(), teacher.bfloat16().float(), labels, alpha=0.5)
    assert guided_distillation_loss(student, teacher, labels, alpha=0.5).dtype == torch.float64


def test_errors_of_the_loss():
    student, teacher, labels = normal(3, 4), normal(3, 4), torch.tensor([1, 0, 2])
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got"):
            guided_distillation_loss(student, teacher, labels, alpha=alpha)
    with pytest.raises(ValueError, match=r"same shape \(..., V\), got \(3, 4\) and \(3, 5\)"):
        guided_distillation_loss(student, normal(3, 5), labels, alpha=0.5)
    with pytest.raises(ValueError, match="labels must have shape"):
        guided_distillation_loss(student, teacher, labels[:2], alpha=0.5)
    with pytest.raises(ValueError, match="labels must have shape .* in int64"):
        guided_distillation_loss(student, teacher, labels.int(), alpha=0.5)
    for wrong in (4, -1):
        with pytest.raises(ValueError, match=rf"labels must be -100 or in \[0, 4\), got {wrong}"):
            guided_distillation_loss(student, teacher, torch.tensor([0, wrong, 0]), alpha=0.5)
