"""KRR-ST: the contract of its functions, gradients, the pool of networks."""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from conftest import golden
from kdbook.datadistill.krr_st import ModelPool, init_synthetic, inner_loss, krr_predict, krr_st_loss
from kdbook.models import SmallConvNet


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def test_golden(shared):
    golden(shared, "datadistill/krr_st")


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 5), st.sampled_from([1e-3, 0.1, 2.0]), st.booleans())
def test_is_ridge_regression_in_feature_space(real, syn, width, ridge, bias):
    a, b, y = draw(real, width, seed=1), draw(syn, width, seed=2), draw(syn, 2, seed=3)
    left, right = (torch.cat([x, torch.ones(len(x), 1)], 1) if bias else x for x in (a, b))
    strength = ridge * right.square().sum()
    weights = torch.linalg.solve(right.T @ right + strength * torch.eye(right.shape[1]), right.T @ y)
    assert torch.allclose(krr_predict(a, b, y, ridge, bias), left @ weights, atol=1e-8)


def test_hand_numbers_and_mean():
    one, other, ten = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]]), torch.tensor([[10.0]])
    assert krr_predict(other, one, ten, 1.0, False) == 5
    assert krr_st_loss(other, torch.tensor([[8.0]]), one, ten, 1.0, False) == 9
    a, b, y, t = draw(5, 3), draw(4, 3), draw(4, 2), draw(5, 2)
    assert torch.isclose(krr_st_loss(a, t, b, y), (t - krr_predict(a, b, y)).square().sum() / 10)
    assert torch.isclose(inner_loss(y, 0 * y), y.square().mean())


def test_scale_of_the_features_does_not_matter_without_bias():
    a, b, y = draw(5, 3), draw(4, 3), draw(4, 2)
    assert torch.allclose(krr_predict(a, b, y, 0.1, False), krr_predict(100 * a, 100 * b, y, 0.1, False))


def test_the_trace_is_detached():
    a, b, y, t = draw(5, 3), draw(4, 3).requires_grad_(), draw(4, 2), draw(5, 2)
    got, = torch.autograd.grad(krr_st_loss(a, t, b, y, 0.5, False), b)
    strength = 0.5 * b.detach().square().sum()
    wanted, = torch.autograd.grad((a @ b.T @ torch.linalg.solve(b @ b.T + strength * torch.eye(4), y) - t).square().mean(), b)
    through, = torch.autograd.grad((a @ b.T @ torch.linalg.solve(b @ b.T + 0.5 * b.square().sum() * torch.eye(4), y) - t).square().mean(), b)
    assert torch.allclose(got, wanted) and not torch.allclose(got, through)


def test_gradients_are_right():
    a, b, y, t = draw(3, 4).requires_grad_(), draw(2, 4), draw(2, 2).requires_grad_(), draw(3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, t, y: krr_st_loss(a, t, b, y, 0.1), (a, t, y))


def test_interpolates_and_keeps_types():
    b, y = draw(5, 8), draw(5, 2)
    assert torch.allclose(krr_predict(b, b, y), y, atol=1e-3)
    assert krr_predict(b.float(), b.float(), y.float()).dtype == torch.float32 and krr_predict(b, b, y).dtype == torch.float64
    assert krr_predict(b.bfloat16(), b.bfloat16(), y.bfloat16()).dtype == torch.float32
    assert krr_predict(b[:0], b, y).shape == (0, 2)


def test_refusals_of_the_regression():
    a, b, y, t = draw(5, 3), draw(4, 3), draw(4, 2), draw(5, 2)
    with pytest.raises(ValueError, match="features_real and features_syn"):
        krr_predict(draw(5, 2), b, y)
    with pytest.raises(ValueError, match="features_real and features_syn"):
        krr_predict(a[0], b, y)
    with pytest.raises(ValueError, match="targets_syn must be"):
        krr_predict(a, b, y[:3])
    with pytest.raises(ValueError, match="targets_syn must be"):
        krr_predict(a, b, y[:, 0])
    for ridge in (-1e-9, float("nan")):
        with pytest.raises(ValueError, match="ridge must be >= 0"):
            krr_predict(a, b, y, ridge)
    with pytest.raises(ValueError, match="singular"):
        krr_predict(a, torch.zeros_like(b), y, 0.0, False)
    with pytest.raises(ValueError, match="targets_real must have"):
        krr_st_loss(a, t[:4], b, y)
    with pytest.raises(ValueError, match="targets_real must have"):
        krr_st_loss(a, t[:, :1], b, y)
    with pytest.raises(ValueError, match="predictions and targets_syn"):
        inner_loss(y, y[:1])


class Watched(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.modes, self.sizes = nn.Linear(3, 2), [], []

    def embed(self, x):
        return x

    def forward(self, x):
        self.modes.append(self.training)
        self.sizes.append(len(x))
        return self.layer(x)


def test_pool_counts_replaces_and_counts_again():
    x, y = draw(6, 3, dtype=torch.float32), draw(6, 2, dtype=torch.float32)
    pool = ModelPool(Watched, num_models=2, max_steps=2, generator=torch.Generator().manual_seed(0))
    assert pool.steps == [0, 0]
    first, counts = pool.models[0], []
    for _ in range(7):
        pool.update(0, x, y)
        counts.append(pool.steps[0])
    assert counts == [1, 2, 0, 1, 2, 0, 1] and pool.steps[1] == 0 and pool.models[0] is not first
    assert first.modes == [True, True] and first.sizes == [6, 6]


def test_pool_warm_up_and_sample():
    x, y = draw(6, 3, dtype=torch.float32).requires_grad_(), draw(6, 2, dtype=torch.float32).requires_grad_()
    torch.manual_seed(0)
    pools = [ModelPool(Watched, num_models=40, max_steps=5, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    for pool in pools:
        pool.warm_up(x, y)
    assert pools[0].steps == pools[1].steps and set(pools[0].steps) == {1, 2, 3, 4}
    drawn = [pools[0].sample() for _ in range(400)]
    assert {index for index, _ in drawn} == set(range(40))
    assert all(model is pools[0].models[index] and not model.training for index, model in drawn)
    assert x.grad is None and y.grad is None


def test_a_step_is_sgd_on_the_mean_squared_error():
    x, y = draw(6, 3, dtype=torch.float32), draw(6, 2, dtype=torch.float32)
    pool = ModelPool(Watched, num_models=1, max_steps=9, lr=0.1, momentum=0.9, weight_decay=0.01)
    reference = Watched()
    reference.load_state_dict(pool.models[0].state_dict())
    optimiser = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        pool.update(0, x, y)
        optimiser.zero_grad()
        nn.functional.mse_loss(reference(x), y).backward()
        optimiser.step()
    assert torch.allclose(pool.models[0].layer.weight, reference.layer.weight)


def test_pool_takes_the_books_networks():
    pool = ModelPool(lambda: SmallConvNet(2, image_size=4, widths=(3,)), num_models=1, max_steps=3)
    x, y = torch.rand(5, 1, 4, 4), torch.rand(5, 2)
    pool.warm_up(x, y)
    index, model = pool.sample()
    assert model.embed(x).shape == (5, model.feature_size) and pool.steps[index] in (1, 2)


@pytest.mark.parametrize("bad", [{"num_models": 0}, {"max_steps": 0}])
def test_pool_refuses(bad):
    with pytest.raises(ValueError, match="num_models and max_steps"):
        ModelPool(Watched, **bad)


def test_initial_set():
    x, model = torch.arange(20.0).view(10, 2), nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
    first = init_synthetic(x, model, 4, torch.Generator().manual_seed(1))
    again = init_synthetic(x, model, 4, torch.Generator().manual_seed(1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert len(first[0].unique(dim=0)) == 4 and all(row.tolist() in x.tolist() for row in first[0])
    assert torch.allclose(first[1], model[0](first[0])) and not first[1].requires_grad and model.training
    first[0].zero_()
    assert x[1:].abs().min() > 0
    assert torch.equal(init_synthetic(x, model, 10)[0].sort(0).values, x)
    for m in (0, 11):
        with pytest.raises(ValueError, match="m must be between 1 and the 10 rows"):
            init_synthetic(x, model, m)
