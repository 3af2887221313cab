import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbook.masking import mask_tokens, masked_patch_loss, patchify, random_masking, unpatchify

seeds = st.integers(0, 10_000)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


# tokens

@settings(max_examples=50, deadline=None)
@given(st.integers(0, 4), st.integers(0, 12), st.floats(0, 1), seeds)
def test_mask_tokens_hides_only_candidates_and_loses_nothing(rows, length, probability, seed):
    ids = torch.randint(2, 30, (rows, length), generator=generator(seed))
    before, candidates = ids.clone(), torch.rand(rows, length, generator=generator(seed + 1)) < 0.7
    corrupted, labels = mask_tokens(ids, candidates, mask_id=1, vocab_size=30, probability=probability, generator=generator(seed))
    chosen = labels != -100
    assert torch.equal(ids, before) and corrupted.dtype == labels.dtype == torch.int64
    assert not (chosen & ~candidates).any()
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(corrupted[~chosen], ids[~chosen])
    again = mask_tokens(ids, candidates, mask_id=1, vocab_size=30, probability=probability, generator=generator(seed))
    assert torch.equal(corrupted, again[0]) and torch.equal(labels, again[1])


def test_mask_tokens_shares():
    ids = torch.full((1000, 200), 5)
    corrupted, labels = mask_tokens(ids, torch.ones_like(ids, dtype=torch.bool), mask_id=101, vocab_size=100, generator=generator())
    chosen = labels != -100
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.005)
    assert (corrupted[chosen] == 101).float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert (corrupted[chosen] == 5).float().mean().item() == pytest.approx(0.1 + 0.001, abs=0.007)
    others = corrupted[chosen & (corrupted != 101) & (corrupted != 5)]
    assert set(others.tolist()) == set(range(100)) - {5}


def test_mask_tokens_ends_of_the_probability():
    ids = torch.arange(10).view(2, 5)
    candidates = ids > 3
    corrupted, labels = mask_tokens(ids, candidates, mask_id=3, vocab_size=10, probability=0.0, generator=generator())
    assert torch.equal(corrupted, ids) and (labels == -100).all()
    assert torch.equal(mask_tokens(ids, candidates, mask_id=3, vocab_size=10, probability=1.0, generator=generator())[1] != -100, candidates)


# patches

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), seeds)
def test_patchify_orders_row_column_channel_and_unpatchify_inverts(batch, channels, rows, p, seed):
    images = normal(batch, channels, rows * p, rows * p, seed=seed)
    patches = patchify(images, p)
    assert patches.shape == (batch, rows * rows, p * p * channels)
    if batch:
        for r in range(rows):
            for c in range(rows):
                square = images[0, :, r * p:(r + 1) * p, c * p:(c + 1) * p]
                assert torch.equal(patches[0, r * rows + c], square.permute(1, 2, 0).flatten())
        assert torch.equal(unpatchify(patches, p), images)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(2, 20), st.floats(0, 0.5), seeds)
def test_random_masking_invariants(batch, count, ratio, seed):
    x = normal(batch, count, 3, seed=seed)
    visible, mask, ids_restore, ids_keep = random_masking(x, ratio, generator(seed))
    n = int(count * (1 - ratio))
    assert visible.shape == (batch, n, 3) and ids_keep.shape == (batch, n) and mask.dtype == torch.float32
    assert (mask.sum(1) == count - n).all() and (mask.gather(1, ids_keep) == 0).all()
    assert torch.equal(ids_restore.sort(1).values, torch.arange(count).expand(batch, -1))
    filled = torch.cat([visible, torch.full((batch, count - n, 3), 99.0)], 1).gather(1, ids_restore[..., None].expand(-1, -1, 3))
    assert torch.equal(filled, torch.where(mask[..., None] == 1, 99.0, x))


def test_random_masking_depends_on_the_noise_alone_and_keeps_the_first_of_ties():
    noise = torch.rand(2, 8, generator=generator())
    first, second = random_masking(normal(2, 8, 3), 0.5, noise=noise), random_masking(normal(2, 8, 5, seed=1), 0.5, noise=noise)
    assert all(torch.equal(a, b) for a, b in zip(first[1:], second[1:]))
    assert random_masking(normal(1, 4, 1), 0.5, noise=torch.zeros(1, 4))[3].tolist() == [[0, 1]]


def test_random_masking_passes_gradients_to_visible_patches_only():
    x = normal(1, 4, 2).requires_grad_()
    visible, mask, _, _ = random_masking(x, 0.5, generator())
    visible.sum().backward()
    assert torch.equal(x.grad[..., 0], 1 - mask)


# the loss

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(2, 6), st.booleans(), seeds)
def test_masked_patch_loss_by_its_definition(batch, count, width, normalize, seed):
    prediction, target = normal(batch, count, width, seed=seed), normal(batch, count, width, seed=seed + 1)
    mask = torch.rand(batch, count, generator=generator(seed)) < 0.6
    mask[0, 0] = True
    wanted = target
    if normalize:
        wanted = torch.stack([(p - p.mean()) / (p.var(unbiased=True) + 1e-6).sqrt() for p in target.flatten(0, 1)]).view_as(target)
    per_patch = ((prediction - wanted) ** 2).mean(-1)
    assert masked_patch_loss(prediction, target, mask, normalize_targets=normalize).item() == pytest.approx(per_patch[mask].mean().item(), rel=1e-4)
    prediction[~mask] = float("nan")
    assert masked_patch_loss(prediction, target, mask, normalize_targets=normalize).isfinite()


def test_masked_patch_loss_without_removed_patches():
    prediction, nothing = normal(1, 2, 3).requires_grad_(), torch.zeros(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="nothing counts"):
        masked_patch_loss(prediction, normal(1, 2, 3), nothing)
    loss = masked_patch_loss(prediction, normal(1, 2, 3), nothing, empty="zero")
    loss.backward()
    assert loss == 0 and torch.equal(prediction.grad, torch.zeros(1, 2, 3))


@pytest.mark.parametrize("normalize", [False, True])
def test_agrees_with_transformers(normalize):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(ViTMAEConfig(
        image_size=12, patch_size=3, num_channels=2, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, decoder_hidden_size=8,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=16, mask_ratio=0.6, norm_pix_loss=normalize)).eval()
    images, noise = normal(3, 2, 12, 12), torch.rand(3, 16, generator=generator())
    with torch.no_grad():
        output = model(images, noise=noise)
    patches = patchify(images, 3)
    _, mask, ids_restore, _ = random_masking(patches, 0.6, noise=noise)
    assert torch.equal(model.patchify(images), patches) and torch.equal(model.unpatchify(patches), unpatchify(patches, 3))
    assert torch.equal(output.mask, mask) and torch.equal(output.ids_restore, ids_restore)
    assert masked_patch_loss(output.logits, patches, mask.bool(), normalize_targets=normalize).item() == pytest.approx(output.loss.item(), rel=1e-6)


def test_golden_numbers(shared):
    def decode(value):
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"])) if isinstance(value, dict) else value

    functions = {
        "patchify": patchify, "random_masking": random_masking,
        "reconstruction_loss": lambda images, prediction, mask, patch_size, norm_pix=False: masked_patch_loss(
            prediction, patchify(images, patch_size), mask.bool(), normalize_targets=norm_pix),
        "masked_autoencoding_loss": lambda p, t, m, *, normalise_targets=False: masked_patch_loss(p, t, m, normalize_targets=normalise_targets),
    }
    seen = 0
    for name in ("compression/dmae", "selfdistill/further_pretraining"):
        for case in json.loads((shared / f"golden/{name}.json").read_text())["cases"]:
            f = functions.get(case["call"].rsplit(".", 1)[1])
            if f is None:
                continue
            got = f(*map(decode, case["args"]), **{k: decode(v) for k, v in case["kwargs"].items()})
            expected = case["expect"] if isinstance(case["expect"], list) else [case["expect"]]
            for one, want in zip(got if isinstance(got, tuple) else [got], expected):
                assert torch.allclose(one, torch.as_tensor(decode(want), dtype=one.dtype), rtol=case.get("rtol", 1e-5), atol=case.get("atol", 1e-6))
            seen += 1
    assert seen >= 4


@pytest.mark.parametrize("call, words", [
    (lambda: mask_tokens(torch.zeros(2), torch.ones(2, dtype=torch.bool), mask_id=1, vocab_size=3), "input_ids must be int64"),
    (lambda: mask_tokens(torch.zeros(2, dtype=torch.int64), torch.ones(2), mask_id=1, vocab_size=3), "candidates must be bool"),
    (lambda: mask_tokens(torch.zeros(2, dtype=torch.int64), torch.ones(3, dtype=torch.bool), mask_id=1, vocab_size=3), "candidates must be bool"),
    (lambda: mask_tokens(torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool), mask_id=1, vocab_size=3, probability=1.5), "probability .* got 1.5"),
    (lambda: mask_tokens(torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool), mask_id=1, vocab_size=0), "vocab_size"),
    (lambda: patchify(torch.zeros(3, 4, 4), 2), "images must be"),
    (lambda: patchify(torch.zeros(1, 3, 4, 6), 2), "H = W"),
    (lambda: patchify(torch.zeros(1, 3, 4, 4), 3), "patch_size must divide"),
    (lambda: patchify(torch.zeros(1, 3, 4, 4), 0), "patch_size must divide"),
    (lambda: unpatchify(torch.zeros(1, 3, 4), 2), "square number"),
    (lambda: unpatchify(torch.zeros(1, 4, 5), 2), "patch_size squared"),
    (lambda: random_masking(torch.zeros(4, 2), 0.5), "x must be"),
    (lambda: random_masking(torch.zeros(1, 4, 2), 1.0), "mask_ratio must be in"),
    (lambda: random_masking(torch.zeros(1, 4, 2), -0.1), "mask_ratio must be in"),
    (lambda: random_masking(torch.zeros(1, 4, 2), 0.9), "at least one patch"),
    (lambda: random_masking(torch.zeros(1, 4, 2), 0.5, noise=torch.zeros(1, 3)), "noise must be"),
    (lambda: masked_patch_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)), "prediction and target"),
    (lambda: masked_patch_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.ones(1, 2)), "mask must be a bool"),
    (lambda: masked_patch_loss(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), torch.ones(1, 2, dtype=torch.bool), normalize_targets=True), "at least 2 values"),
])
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
