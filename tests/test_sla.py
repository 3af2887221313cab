"""SLA: the contract of its functions, their layout of copies, and the refusals."""
import inspect
import math

import pytest
import torch
from hypothesis import given, strategies as st

from conftest import golden
from kdbook.losses import cross_entropy, forward_kl
from kdbook.selfdistill.sla import aggregate_logits, joint_labels, permute6, rotate4, single_logits, sla_loss, sla_sd_loss

sizes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))  # B, N, M


def example(b, n, m, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(b * m, n * m, generator=generator), torch.randn(b, n, generator=generator), torch.randint(n, (b,), generator=generator))


def test_golden(shared):
    golden(shared, "selfdistill/sla")


@pytest.mark.parametrize("function, expected", [
    (rotate4, "(images: torch.Tensor) -> torch.Tensor"),
    (joint_labels, "(labels: torch.Tensor, num_transforms: int) -> torch.Tensor"),
    (sla_loss, "(joint_logits: torch.Tensor, labels: torch.Tensor, num_transforms: int, *, sum_over_transforms: bool = False) -> torch.Tensor"),
    (single_logits, "(joint_logits: torch.Tensor, num_transforms: int) -> torch.Tensor"),
    (aggregate_logits, "(joint_logits: torch.Tensor, num_transforms: int) -> torch.Tensor"),
    (sla_sd_loss, "(joint_logits: torch.Tensor, single_head_logits: torch.Tensor, labels: torch.Tensor, num_transforms: int, *, "
                  "temperature: float = 1.0, sum_over_transforms: bool = False) -> torch.Tensor"),
])
def test_signatures(function, expected):
    assert str(inspect.signature(function)) == expected


@pytest.mark.parametrize("function, count", [(rotate4, 4), (permute6, 6)])
def test_copies_are_neighbours_and_the_first_is_the_picture(function, count):
    images = torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    copies = function(images)
    assert copies.shape == (3 * count, 3, 5, 5) and torch.equal(copies[::count], images)
    for b in range(3):
        assert torch.equal(copies[b * count:(b + 1) * count], function(images[b:b + 1]))
    assert function(images[:0]).shape == (0, 3, 5, 5)


def test_rotations_turn_left_and_close_the_circle():
    images = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    once = rotate4(images)[1::4]
    assert torch.equal(once, images.transpose(2, 3).flip(2))  # counter-clockwise: the right column becomes the top row
    for _ in range(3):
        once = rotate4(once)[1::4]
    assert torch.equal(once, images)


def test_colour_orders():
    pixel = torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1)
    assert ["".join("RGB"[int(c)] for c in row) for row in permute6(pixel).flatten(1)] == ["RGB", "RBG", "GRB", "GBR", "BRG", "BGR"]


@given(sizes)
def test_joint_labels_name_every_pair_once(size):
    b, n, m = size
    joint = joint_labels(torch.arange(n), m)
    assert joint.dtype == torch.int64 and joint.tolist() == list(range(n * m))
    assert joint_labels(torch.tensor([-100, 0]), m).tolist() == [-100] * m + list(range(m))


@given(sizes, st.integers(0, 20))
def test_against_loops(size, seed):
    b, n, m = size
    joint, single, labels = example(b, n, m, seed)
    loss = sum(-joint[i * m + j].log_softmax(0)[labels[i] * m + j] for i in range(b) for j in range(m)) / (b * m)
    assert torch.allclose(sla_loss(joint, labels, m), loss, atol=1e-5)
    assert torch.allclose(sla_loss(joint, labels, m, sum_over_transforms=True), m * loss, atol=1e-4)
    mean = torch.stack([torch.stack([sum(joint[i * m + j, c * m + j] for j in range(m)) / m for c in range(n)]) for i in range(b)])
    assert torch.allclose(aggregate_logits(joint, m), mean, atol=1e-5)
    assert torch.equal(single_logits(joint, m), torch.stack([torch.stack([joint[i * m, c * m] for c in range(n)]) for i in range(b)]))
    for temperature, total in ((1.0, False), (2.5, True)):
        expected = (m if total else 1) * loss + cross_entropy(single, labels) + temperature**2 * forward_kl(single, mean, temperature=temperature)
        assert torch.allclose(sla_sd_loss(joint, single, labels, m, temperature=temperature, sum_over_transforms=total), expected, atol=1e-4)


@given(sizes, st.integers(0, 20))
def test_tied_heads_are_augmentation_and_multi_task(size, seed):
    b, n, m = size
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(b * m, n, generator=generator), torch.randn(b * m, m, generator=generator)
    labels = torch.randint(n, (b,), generator=generator)
    da = cross_entropy(u, labels.repeat_interleave(m))
    assert torch.allclose(sla_loss(u.repeat_interleave(m, 1), labels, m), da + math.log(m), atol=1e-5)
    assert torch.allclose(sla_loss((u[:, :, None] + v[:, None]).flatten(1), labels, m), da + cross_entropy(v, torch.arange(m).repeat(b)), atol=1e-5)


def test_one_transformation_is_ordinary_classification():
    joint, single, labels = example(4, 3, 1)
    assert torch.allclose(sla_loss(joint, labels, 1), cross_entropy(joint, labels))
    assert torch.equal(aggregate_logits(joint, 1), joint) and torch.equal(single_logits(joint, 1), joint)


def test_the_teacher_gets_no_gradient_from_the_student():
    joint, single, labels = example(3, 4, 4)
    joint.requires_grad_(), single.requires_grad_()
    from_both, = torch.autograd.grad(sla_sd_loss(joint, single, labels, 4), joint)
    from_sla, = torch.autograd.grad(sla_loss(joint, labels, 4), joint)
    assert torch.equal(from_both, from_sla)
    teacher = aggregate_logits(joint, 4).detach().softmax(1)
    from_single, = torch.autograd.grad(sla_sd_loss(joint, single, labels, 4), single)
    hard = torch.nn.functional.one_hot(labels, 4)
    assert torch.allclose(from_single, (2 * single.softmax(1) - hard - teacher).detach() / 3, atol=1e-6)


def test_uncounted_and_empty():
    joint, single, labels = example(3, 4, 2)
    some = torch.tensor([int(labels[0]), -100, int(labels[2])])
    assert torch.allclose(sla_loss(joint, some, 2), sla_loss(joint[[0, 1, 4, 5]], some[[0, 2]], 2))
    nothing = joint[:0].requires_grad_()
    assert sla_loss(nothing, labels[:0], 2) == 0 and sla_sd_loss(nothing, single[:0], labels[:0], 2) == 0
    assert aggregate_logits(nothing, 2).shape == (0, 4)


def test_refusals():
    joint, single, labels = example(3, 4, 2)
    with pytest.raises(ValueError, match="images must be square"):
        rotate4(torch.zeros(1, 1, 2, 3))
    with pytest.raises(ValueError, match="images must be square"):
        rotate4(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="three channels"):
        permute6(torch.zeros(1, 1, 2, 2))
    for function in (single_logits, aggregate_logits, lambda z, m: sla_loss(z, labels, m), lambda z, m: sla_sd_loss(z, single, labels, m)):
        for bad in (joint[:5], joint[:, :7], joint[0]):
            with pytest.raises(ValueError, match="joint_logits must be"):
                function(bad, 2)
        with pytest.raises(ValueError, match="num_transforms must be at least 1, got 0"):
            function(joint, 0)
    with pytest.raises(ValueError, match="num_transforms must be at least 1"):
        joint_labels(labels, 0)
    with pytest.raises(ValueError, match=r"labels must be \(B,\)"):
        joint_labels(labels[None], 2)
    with pytest.raises(ValueError, match=r"labels must be \(3,\) for 6 rows"):
        sla_loss(joint, labels[:2], 2)
    for bad in (single[:2], joint[:, :4], single[:, :3]):
        with pytest.raises(ValueError, match=r"single_head_logits must be \(3, 4\)"):
            sla_sd_loss(joint, bad, labels, 2)
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match="temperature must be > 0"):
            sla_sd_loss(joint, single, labels, 2, temperature=bad)
