import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbook.regression import fit_curve, kernel_ridge, rbf_kernel


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.floats(0.01, 50), st.integers(0, 10_000))
def test_rbf_kernel_is_a_kernel(n, d, gamma, seed):
    x = normal(n, d, seed=seed)
    kernel = rbf_kernel(x, x, gamma)
    assert torch.equal(kernel.diagonal(), torch.ones(n, dtype=x.dtype))
    assert torch.allclose(kernel, kernel.T) and kernel.min() >= 0 and kernel.max() <= 1
    assert torch.linalg.eigvalsh(kernel).min() > -1e-10
    differences = x[:, None] - x[None]
    assert torch.allclose(kernel, torch.exp(-gamma * differences.square().sum(-1)))


def test_rbf_kernel_keeps_small_distances_of_far_points():
    far = torch.tensor([[10_000.0], [10_000.5]])
    assert rbf_kernel(far, far, 1.0)[0, 1].item() == pytest.approx(np.exp(-0.25), rel=1e-6)


def test_rbf_kernel_keeps_dtype_and_handles_no_rows():
    assert rbf_kernel(torch.ones(2, 3), torch.ones(4, 3), 1.0).dtype == torch.float32
    assert rbf_kernel(torch.ones(0, 3), torch.ones(4, 3), 1.0).shape == (0, 4)


def test_rbf_kernel_gradient_is_finite_where_points_coincide():
    x = torch.zeros(2, 3, requires_grad=True)
    rbf_kernel(x, torch.zeros(1, 3), 2.0).sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 3))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 3), st.floats(1e-3, 100), st.integers(0, 10_000))
def test_kernel_ridge_solves_its_equation_and_shrinks(n, c, ridge, seed):
    x, targets = normal(n, 2, seed=seed), normal(n, c, seed=seed + 1)
    kernel = rbf_kernel(x, x, 1.0)
    coefficients = kernel_ridge(kernel, targets, ridge)
    assert torch.allclose(kernel @ coefficients + ridge * coefficients, targets)
    assert (kernel @ coefficients).norm() <= targets.norm() * (1 + 1e-9)


def test_kernel_ridge_equals_ridge_regression_on_features():
    features, targets, new = normal(5, 9), normal(5, 2, seed=1), normal(4, 9, seed=2)
    dual = new @ features.T @ kernel_ridge(features @ features.T, targets, torch.tensor(0.7))
    primal = new @ torch.linalg.solve(features.T @ features + 0.7 * torch.eye(9, dtype=torch.float64), features.T @ targets)
    assert torch.allclose(dual, primal)


def test_kernel_ridge_is_linear_in_targets_and_has_exact_gradients():
    features, a, b = normal(4, 3), normal(4, 2, seed=1), normal(4, 2, seed=2)
    kernel = features @ features.T
    assert torch.allclose(kernel_ridge(kernel, 2 * a - b, 0.5), 2 * kernel_ridge(kernel, a, 0.5) - kernel_ridge(kernel, b, 0.5))
    ridge = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, t, r: kernel_ridge(h @ h.T, t, r), (features.requires_grad_(), a.requires_grad_(), ridge))


@pytest.mark.parametrize("call, words", [
    (lambda: rbf_kernel(torch.ones(2), torch.ones(2, 1), 1.0), "a and b"),
    (lambda: rbf_kernel(torch.ones(2, 3), torch.ones(2, 1), 1.0), "same d"),
    (lambda: rbf_kernel(torch.ones(2, 1), torch.ones(2, 1), 0.0), "gamma must be > 0, got 0.0"),
    (lambda: rbf_kernel(torch.ones(2, 1), torch.ones(2, 1), float("nan")), "gamma must be > 0"),
    (lambda: kernel_ridge(torch.ones(2, 3), torch.ones(2, 1), 1.0), "square"),
    (lambda: kernel_ridge(torch.eye(2), torch.ones(3, 1), 1.0), "n = 2 rows"),
    (lambda: kernel_ridge(torch.eye(2), torch.ones(2), 1.0), "targets must be"),
    (lambda: kernel_ridge(torch.eye(2), torch.ones(2, 1), -1.0), "ridge must be >= 0, got -1.0"),
    (lambda: kernel_ridge(torch.eye(2), torch.ones(2, 1), torch.ones(2)), "0-dim"),
    (lambda: kernel_ridge(torch.zeros(2, 2), torch.ones(2, 1), 0), "singular"),
    (lambda: fit_curve(lambda c: c, []), "starts"),
    (lambda: fit_curve(lambda c: c, [[2.0]], bounds=(0, 1)), "within bounds"),
    (lambda: fit_curve(lambda c: c * np.nan, [[2.0]]), "finite"),
])
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@settings(max_examples=15, deadline=None)
@given(st.floats(0.1, 1.0), st.floats(0.0, 2.0), st.floats(0.5, 5.0))
def test_fit_curve_recovers_a_scaling_law(alpha, floor, beta):
    sizes = np.logspace(0, 2, 6)
    losses = beta * sizes ** -alpha + floor

    def residuals(c):
        return (np.exp(c[0] - c[1] * np.log(sizes / 10)) + c[2]) / losses - 1

    starts = [[0.0, a, share * losses.min()] for a in (0.2, 0.5, 1.0) for share in (0.0, 0.5, 0.9)]
    found = fit_curve(residuals, starts, bounds=([-np.inf, 0, 0], [np.inf, 5, losses.min()]))
    assert found.dtype == np.float64 and found.shape == (3,)
    assert np.allclose(found[1:], [alpha, floor], rtol=1e-3, atol=1e-3)


def test_fit_curve_keeps_the_best_start_and_is_deterministic():
    x = np.linspace(0, 1, 40)
    y = np.sin(12 * x)  # as a function of its frequency this fit has many local minima

    def residuals(c):
        return np.sin(c[0] * x) - y

    alone = fit_curve(residuals, [[3.0]])
    several = fit_curve(residuals, [[3.0], [11.0], [20.0]])
    assert abs(alone[0] - 12) > 1 and several[0] == pytest.approx(12)
    assert np.array_equal(several, fit_curve(residuals, [[3.0], [11.0], [20.0]]))


def test_fit_curve_leaves_out_starts_that_are_not_finite():
    with np.errstate(all="raise"):
        found = fit_curve(lambda c: np.log(c) - np.log([2.0, 2.0]), [[-1.0], [1.0]])
    assert found[0] == pytest.approx(2.0)


def test_fit_curve_respects_bounds():
    assert fit_curve(lambda c: c - 3.0, [[0.5, 0.5]], bounds=([0, 0], [1, 10])) == pytest.approx([1.0, 3.0], abs=1e-6)
