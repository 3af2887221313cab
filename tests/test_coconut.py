"""COCONUT: the two contrasts against loops, herding, the memory, the summary, and the hub encoder of the paper preset."""
import inspect
import json
import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from conftest import golden
from kdbook.multimodal import coconut
from kdbook.multimodal.coconut import RehearsalMemory, continual_summary, herding_selection, multimodal_contrastive_loss, nspt_loss


def vectors(n=7, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=generator) for _ in range(2)] + [torch.randint(0, 3, (n,), generator=generator), torch.rand(n, generator=generator) < 0.6]


def test_golden(shared):
    golden(shared, "multimodal/coconut")


def test_signatures():
    expected = {"nspt_loss": ["student", "teacher", "labels", "rehearsal", "temperature", "negatives"], "multimodal_contrastive_loss": ["audio", "text", "labels", "temperature"],
                "herding_selection": ["features", "m"], "RehearsalMemory": ["per_class"], "continual_summary": ["accuracy", "task_sizes"]}
    for name, arguments in expected.items():
        assert list(inspect.signature(getattr(coconut, name)).parameters) == arguments
    assert list(inspect.signature(RehearsalMemory.sample).parameters) == ["self", "n", "generator"]
    assert list(inspect.signature(RehearsalMemory.add_class).parameters) == ["self", "label", "features", "items"]


def slow_nspt(student, teacher, labels, rehearsal, tau, negatives):
    s, t = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (student, teacher))
    n, losses = len(labels), []
    for k in range(n):
        mates = [p for p in range(n) if p != k and labels[p] == labels[k]]
        if not rehearsal[k] or not mates:
            continue
        up = {p: math.exp(s[k] @ t[p] / tau) for p in mates}
        down = sum(math.exp(s[k] @ (s if negatives == "student" else t)[i] / tau) for i in range(n) if labels[i] != labels[k])
        losses.append(-sum(math.log(up[p] / (sum(up.values()) + down)) for p in mates) / len(mates))
    return sum(losses) / len(losses) if losses else 0.0


@given(st.integers(0, 60), st.sampled_from(["student", "teacher"]), st.sampled_from([0.1, 0.5, 2.0]))
def test_nspt_against_loops(seed, negatives, tau):
    student, teacher, labels, rehearsal = vectors(seed=seed)
    assert nspt_loss(student, teacher, labels, rehearsal, tau, negatives).item() == pytest.approx(slow_nspt(student, teacher, labels, rehearsal, tau, negatives), rel=1e-4, abs=1e-5)


@given(st.integers(0, 40))
def test_multimodal_against_loops(seed):
    audio, text, labels, _ = vectors(seed=seed)
    a, t = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (audio, text))
    scores = a @ t.T / 0.1

    def one_way(s):
        rows = [-(s[k] - s[k].logsumexp(0))[labels == labels[k]].mean() for k in range(len(labels))]
        return torch.stack(rows).mean()
    expected = (one_way(scores) + one_way(scores.T)) / 2
    assert multimodal_contrastive_loss(audio, text, labels).item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.allclose(multimodal_contrastive_loss(3 * audio, text, labels), multimodal_contrastive_loss(text, 0.2 * audio, labels), rtol=1e-5)


def test_gradients_reach_the_student_only_and_both_modalities():
    student, teacher, labels, rehearsal = (x.requires_grad_() if x.is_floating_point() else x for x in vectors())
    for negatives in ("student", "teacher"):
        nspt_loss(student, teacher, labels, rehearsal, negatives=negatives).backward()
        assert student.grad.abs().sum() > 0 and teacher.grad is None
    multimodal_contrastive_loss(student, teacher, labels).backward()
    assert teacher.grad.abs().sum() > 0


def test_nspt_without_anchors_is_zero_with_a_gradient_path():
    student, teacher, _, _ = vectors()
    student.requires_grad_()
    for labels, rehearsal in ((torch.arange(7), torch.ones(7, dtype=torch.bool)), (torch.zeros(7, dtype=torch.int64), torch.zeros(7, dtype=torch.bool))):
        loss = nspt_loss(student, teacher, labels, rehearsal)
        loss.backward()
        assert loss == 0 and torch.equal(student.grad, torch.zeros_like(student))
    assert nspt_loss(student[:0], teacher[:0], torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)) == 0


def test_a_zero_vector_and_one_class_are_finite():
    student, teacher, _, rehearsal = vectors()
    student[0] = 0
    student.requires_grad_()
    loss = nspt_loss(student, teacher, torch.zeros(7, dtype=torch.int64), rehearsal) + multimodal_contrastive_loss(student, teacher, torch.zeros(7, dtype=torch.int64))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_losses_refuse():
    student, teacher, labels, rehearsal = vectors()
    for call, message in ((lambda: nspt_loss(student, teacher[:, :3], labels, rehearsal), "same shape"), (lambda: nspt_loss(student, teacher, labels[:3], rehearsal), "labels and rehearsal"),
                          (lambda: nspt_loss(student, teacher, labels, rehearsal.long()), "rehearsal bool"), (lambda: nspt_loss(student, teacher, labels, rehearsal, 0.0), "temperature must be > 0, got 0.0"),
                          (lambda: nspt_loss(student, teacher, labels, rehearsal, negatives="both"), "negatives must be 'student' or 'teacher', got 'both'"),
                          (lambda: multimodal_contrastive_loss(student, teacher[:3], labels), "shapes"), (lambda: multimodal_contrastive_loss(student, teacher, labels, -1.0), "temperature")):
        with pytest.raises(ValueError, match=message):
            call()


@given(st.integers(0, 40), st.integers(0, 9))
def test_herding_is_greedy(seed, m):
    features = torch.randn(9, 3, generator=torch.Generator().manual_seed(seed))
    chosen = herding_selection(features, m)
    assert len(chosen) == len(set(chosen)) == m and chosen == herding_selection(features, 9)[:m] and all(type(i) is int for i in chosen)
    assert chosen == herding_selection(5 * features, m)
    units = features.double() / features.double().norm(dim=1, keepdim=True)
    for k in range(m):
        gap = lambda i: (units.mean(0) - units[chosen[:k] + [i]].mean(0)).norm().item()
        assert gap(chosen[k]) <= min(gap(i) for i in range(9) if i not in chosen[:k]) + 1e-9


def test_herding_ties_and_refusals():
    assert herding_selection(torch.ones(4, 2), 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="m must be between 0 and the 4 rows of features, got 5"):
        herding_selection(torch.ones(4, 2), 5)
    with pytest.raises(ValueError, match="m must be"):
        herding_selection(torch.ones(4, 2), -1)
    with pytest.raises(ValueError, match="features must have shape"):
        herding_selection(torch.ones(4), 1)
    with pytest.raises(ValueError, match="finite"):
        herding_selection(torch.tensor([[math.nan, 1.0]]), 1)


def test_memory():
    memory = RehearsalMemory(3)
    assert memory.sample(0)[0] == [] and memory.sample(0)[1].dtype == torch.int64
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    memory.add_class(2, features, list("abcde"))
    memory.add_class(0, features[:2], list("xy"))
    assert memory.contents()[0][:3] == ["abcde"[i] for i in herding_selection(features, 3)] and len(memory) == 5
    first, second = (memory.sample(4, torch.Generator().manual_seed(7)) for _ in range(2))
    assert first[0] == second[0] and torch.equal(first[1], second[1]) and len(set(first[0])) == 4
    assert all((label == 0) == (item in "xy") for item, label in zip(*first))
    items, labels = memory.sample(12, torch.Generator().manual_seed(1))
    assert len(items) == len(labels) == 12 and all(2 <= items.count(item) <= 3 for item in memory.contents()[0])
    with pytest.raises(ValueError, match="empty"):
        RehearsalMemory(1).sample(1)
    with pytest.raises(ValueError, match="per_class must be at least 1, got 0"):
        RehearsalMemory(0)
    with pytest.raises(ValueError, match="equally many"):
        memory.add_class(1, features, ["a"])
    with pytest.raises(ValueError, match="at least 0"):
        memory.sample(-1)


def test_summary():
    assert continual_summary([[0.9], [0.5, 0.8]], [10, 30]) == pytest.approx({"avg_acc": 0.8125, "last_acc": 0.725, "forgetting": 0.4})
    assert continual_summary([[0.7]], [5]) == pytest.approx({"avg_acc": 0.7, "last_acc": 0.7, "forgetting": 0.0})
    table = [[0.6], [0.8, 0.5], [0.7, 0.1, 1.0]]
    assert continual_summary(table, [1, 1, 2])["forgetting"] == pytest.approx((0.1 + 0.4) / 2)
    assert continual_summary([row + [0.3] * (3 - len(row)) for row in table], [1, 1, 2]) == continual_summary(table, [1, 1, 2])
    for bad, sizes, message in (([], [], "task_sizes"), ([[0.5], [0.5]], [1, 1], "at least i \\+ 1"), ([[0.5]], [1, 2], "task_sizes"), ([[0.5]], [0], "task_sizes")):
        with pytest.raises(ValueError, match=message):
            continual_summary(bad, sizes)


def test_the_hub_encoder_takes_a_wav2vec(root):
    """The notebook's wrapper, with a small wav2vec 2.0: a pooled vector, and a gradient that stops before the convolutions."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model
    cells = ["".join(cell["source"]) for cell in json.loads((root / "nbs" / "multimodal" / "coconut.ipynb").read_text())["cells"]]
    names = {"nn": nn, "Tensor": torch.Tensor, "np": __import__("numpy"), "torch": torch, "Setting": object, "seconds": 0.1}
    exec(next(cell for cell in cells if cell.startswith("class HubEncoder")), names)
    torch.manual_seed(0)
    model = Wav2Vec2Model(Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8),
                                         num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0))
    encoder = names["HubEncoder"](model).eval()
    features = encoder(torch.randn(2, 1600))
    features.sum().backward()
    assert features.shape == (2, 16) and model.encoder.layers[0].attention.q_proj.weight.grad is not None
    assert all(p.grad is None for p in model.feature_extractor.parameters())
    import io
    import soundfile
    file = io.BytesIO()
    soundfile.write(file, torch.randn(4000).mul(0.1).numpy(), 8000, format="WAV")
    assert names["decoded"]({"bytes": file.getvalue(), "path": None}).shape == (1600,)
