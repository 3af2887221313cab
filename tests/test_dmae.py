"""DMAE: the contract of its functions, the early exit, and the models of the presets."""
import inspect
import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from conftest import golden
from kdbook.compression import dmae
from kdbook.compression.dmae import aligned_layer, dmae_loss, feature_alignment_loss, patchify, random_masking, reconstruction_loss, visible_features
from kdbook.models import flop_count, vit_mae


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_golden(shared):
    golden(shared, "compression/dmae")


def test_signatures():
    expected = {"patchify": "images, patch_size", "random_masking": "x, mask_ratio, generator=None, noise=None",
                "reconstruction_loss": "images, prediction, mask, patch_size, norm_pix=False",
                "feature_alignment_loss": "student_feature, teacher_feature, projection=None, kind=l1, normalize=True",
                "aligned_layer": "depth, fraction=0.75",
                "dmae_loss": "images, prediction, mask, student_feature, teacher_feature, patch_size, projection=None, alpha=1.0, norm_pix=False"}
    for name, signature in expected.items():
        parameters = inspect.signature(getattr(dmae, name)).parameters.values()
        assert ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters) == signature
        assert name in dmae.__all__


def test_patchify_order_and_refusals():
    images = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    patches = patchify(images, 2)
    assert patches.shape == (2, 4, 12)
    assert torch.equal(patches[1, 1], images[1, :, :2, 2:].permute(1, 2, 0).flatten())  # row, column, channel
    for bad, size in ((draws(1, 3, 4, 6), 2), (draws(1, 3, 4, 4), 3), (draws(3, 4, 4), 2), (draws(1, 3, 4, 4), 0)):
        with pytest.raises(ValueError):
            patchify(bad, size)


@given(st.integers(1, 20), st.floats(0, 0.99), st.integers(0, 100))
def test_masks_keep_the_smallest_noise_and_restore_inverts(count, ratio, seed):
    x, noise = draws(2, count, 3, seed=seed), uniform(2, count, seed=seed)
    n = int(count * (1 - ratio))
    if n < 1:
        with pytest.raises(ValueError):
            random_masking(x, ratio, noise=noise)
        return
    visible, mask, restore, keep = random_masking(x, ratio, noise=noise)
    assert visible.shape == (2, n, 3) and mask.sum(1).tolist() == [count - n] * 2 and mask.dtype == torch.float32
    order = noise.argsort(1)
    assert torch.equal(keep, order[:, :n]) and torch.equal(order.gather(1, restore), torch.arange(count).expand(2, -1))
    assert torch.equal(visible, x.gather(1, keep[..., None].expand(-1, -1, 3))) and not mask.gather(1, keep).any()


def test_masking_is_seeded_and_counts_as_the_official_code():
    x = draws(2, 196, 1)
    assert random_masking(x, 0.95)[0].shape[1] == 9  # the paper says ten
    one, two = (random_masking(x, 0.75, torch.Generator().manual_seed(3))[3] for _ in range(2))
    assert torch.equal(one, two)
    for ratio in (-0.1, 1.0, 1.5, math.nan, 0.999):
        with pytest.raises(ValueError, match="mask_ratio"):
            random_masking(x, ratio)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_reconstruction_against_the_formula(norm_pix):
    images, prediction, mask = draws(3, 2, 6, 6), draws(3, 9, 8, seed=1), (uniform(3, 9) > 0.4).float()
    target = patchify(images, 2)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (prediction - target).square().mean(-1)
    expected = (error * mask).sum() / mask.sum()
    assert torch.allclose(reconstruction_loss(images, prediction, mask, 2, norm_pix), expected, atol=1e-6)
    prediction[mask == 0] = 100.0  # visible patches do not count
    assert torch.allclose(reconstruction_loss(images, prediction, mask, 2, norm_pix), expected, atol=1e-6)


def test_reconstruction_refusals():
    images, prediction = draws(2, 1, 4, 4), draws(2, 4, 4)
    with pytest.raises(ValueError, match="prediction must be"):
        reconstruction_loss(images, prediction[:, :3], torch.ones(2, 4), 2)
    with pytest.raises(ValueError, match="mask must be"):
        reconstruction_loss(images, prediction, torch.ones(2, 3), 2)
    with pytest.raises(ValueError):
        reconstruction_loss(images, prediction, torch.zeros(2, 4), 2)


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("normalize", [True, False])
def test_alignment_against_the_formula(kind, normalize):
    student, teacher, projection = draws(2, 5, 3), draws(2, 5, 7, seed=1).requires_grad_(), nn.Linear(3, 7)
    student.requires_grad_()
    a, b = projection(student), teacher.detach()
    if normalize:
        a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    expected = ((a - b).abs() if kind == "l1" else (a - b).square()).mean()
    loss = feature_alignment_loss(student, teacher, projection, kind, normalize)
    assert torch.allclose(loss, expected, atol=1e-6) and loss.ndim == 0
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0 and projection.weight.grad.abs().sum() > 0


@given(st.floats(0.1, 50), st.floats(0.1, 50), st.integers(0, 30))
def test_alignment_forgets_lengths_and_is_zero_for_equal_directions(left, right, seed):
    h = draws(2, 3, 8, seed=seed)
    assert feature_alignment_loss(left * h, right * h) < 1e-6
    other = draws(2, 3, 8, seed=seed + 1)
    assert torch.allclose(feature_alignment_loss(left * h, right * other), feature_alignment_loss(h, other), atol=1e-6)


def test_alignment_refusals():
    with pytest.raises(ValueError, match="kind must be 'l1' or 'l2', got 'cosine'"):
        feature_alignment_loss(draws(1, 2, 3), draws(1, 2, 3), kind="cosine")
    for student, teacher, projection in ((draws(1, 2, 3), draws(1, 2, 4), None), (draws(1, 2, 3), draws(1, 3, 3), None), (draws(1, 2, 3), draws(1, 2, 3), nn.Linear(3, 4))):
        with pytest.raises(ValueError, match="shape"):
            feature_alignment_loss(student, teacher, projection)


def test_aligned_layers():
    assert [aligned_layer(d) for d in (1, 2, 3, 4, 6, 10, 12, 24)] == [0, 1, 1, 2, 3, 7, 8, 17]
    assert aligned_layer(12, 1.0) == 11 and aligned_layer(12, 0.25) == 2 and aligned_layer(12, 0.0) == 0
    for depth, fraction, name in ((0, 0.75, "depth"), (4, 1.1, "fraction"), (4, -0.1, "fraction"), (4, math.nan, "fraction")):
        with pytest.raises(ValueError, match=name):
            aligned_layer(depth, fraction)


def test_the_whole_loss_is_the_sum_of_its_parts():
    images, prediction, mask = draws(2, 1, 4, 4), draws(2, 4, 4, seed=1), torch.tensor([[1.0, 1, 0, 1]] * 2)
    student, teacher, projection = draws(2, 2, 3, seed=2), draws(2, 2, 5, seed=3), nn.Linear(3, 5)
    for alpha in (0.0, 1.0, 7.5):
        for norm_pix in (False, True):
            parts = dmae_loss(images, prediction, mask, student, teacher, 2, projection, alpha, norm_pix)
            assert list(parts) == ["reconstruction", "alignment", "total"]
            assert torch.equal(parts["reconstruction"], reconstruction_loss(images, prediction, mask, 2, norm_pix))
            assert torch.equal(parts["alignment"], feature_alignment_loss(student, teacher, projection))
            assert torch.allclose(parts["total"], parts["reconstruction"] + alpha * parts["alignment"])
    with pytest.raises(ValueError, match="alpha must be >= 0"):
        dmae_loss(images, prediction, mask, student, teacher, 2, projection, -1.0)


def test_features_are_the_models_own_and_the_exit_is_early():
    model = vit_mae(8, 2, channels=1, width=16, layers=4, heads=2, seed=0)
    images, noise = draws(3, 1, 8, 8), uniform(3, 16)
    features, mask, restore = visible_features(model.vit, images, 0.75, noise)
    own = model.vit(images, noise=noise, output_hidden_states=True)
    assert len(features) == 4 and all(f.shape == (3, 5, 16) for f in features)
    assert torch.allclose(model.vit.layernorm(features[-1]), own.last_hidden_state, atol=1e-5)
    assert torch.equal(mask, own.mask) and torch.equal(restore, own.ids_restore)
    early = visible_features(model.vit, images, 0.75, noise, blocks=3)[0]
    assert len(early) == 3 and torch.equal(early[-1], features[2])
    flops = [flop_count(lambda: visible_features(model.vit, images, 0.75, noise, blocks)) for blocks in (3, 4)]
    assert flops[0] < 0.8 * flops[1]
    assert visible_features(model.vit, images, 0.0, noise)[0][0].shape == (3, 17, 16)
    for blocks in (0, 5, -1):
        with pytest.raises(ValueError, match="blocks must be between 1 and the encoder's depth 4"):
            visible_features(model.vit, images, 0.75, noise, blocks)


def test_features_follow_the_patch_and_not_its_place_in_the_noise():
    model = vit_mae(8, 2, channels=1, width=16, layers=2, heads=2, seed=0)
    images, order = draws(1, 1, 8, 8), torch.arange(16.0)[None]
    forward, backward = (visible_features(model.vit, images, 0.0, noise)[0][-1] for noise in (order, order.flip(1)))
    assert torch.allclose(forward[:, 1:], backward[:, 1:].flip(1), atol=1e-5)


def test_two_widths_share_a_mask_and_train():
    teacher, student = (vit_mae(8, 2, channels=1, width=width, layers=4, heads=2, decoder_width=16, seed=0) for width in (32, 16))
    projection, images, noise = nn.Linear(16, 32), draws(4, 1, 8, 8), uniform(4, 16)
    features, mask, restore = visible_features(student.vit, images, 0.75, noise)
    with torch.no_grad():
        target, other_mask, _ = visible_features(teacher.vit, images, 0.75, noise, blocks=3)
    assert torch.equal(mask, other_mask)
    prediction = student.decoder(student.vit.layernorm(features[-1]), restore).logits
    parts = dmae_loss(images, prediction, mask, features[aligned_layer(4)], target[-1], 2, projection, 10.0)
    parts["total"].backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad) and projection.weight.grad is not None
    assert torch.allclose(parts["reconstruction"], student(images, noise=noise).loss, atol=1e-5)
