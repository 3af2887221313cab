"""DCD: the contract of its functions, the trainer, and the paper preset's models."""
import inspect
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import nn

from conftest import golden
from kdbook.multimodal.dcd import DCDTrainer, dcd_loss, difficulty_weights, mine_hard_negatives, recall_at_k


def pair(rows=4, columns=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator), 3 * torch.randn(rows, columns, generator=generator)


def test_golden(shared):
    golden(shared, "multimodal/dcd")


def test_signatures():
    parameters = lambda function: str(inspect.signature(function)).replace("torch.Tensor", "Tensor").replace("torch.nn.modules.module.Module", "nn.Module")
    assert list(inspect.signature(mine_hard_negatives).parameters) == ["teacher_scores", "num_negatives"]
    assert parameters(dcd_loss).endswith("alpha: float = 0.2, temperature: float = 1.0, dynamic: bool = True, official_reduction: bool = False) -> dict[str, Tensor]") or "alpha: 'float'" in parameters(dcd_loss)
    assert inspect.signature(recall_at_k).parameters["ks"].default == (1, 5, 10)
    defaults = {name: p.default for name, p in inspect.signature(DCDTrainer).parameters.items()}
    assert (defaults["num_negatives"], defaults["alpha"], defaults["dynamic"]) == (7, 0.2, True)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 99), st.data())
def test_mined_are_the_best_false_ones_with_the_truth_first(rows, false, seed, data):
    k = data.draw(st.integers(1, false))
    scores = torch.randint(0, 4, (rows, 1 + false), generator=torch.Generator().manual_seed(seed)).float()  # many ties
    chosen = mine_hard_negatives(scores, k)
    assert chosen.dtype == torch.int64 and chosen.shape == (rows, 1 + k) and (chosen[:, 0] == 0).all()
    for row, columns in zip(scores, chosen.tolist()):
        assert columns[1:] == sorted(range(1, 1 + false), key=lambda j: (-row[j].item(), j))[:k]


@given(st.integers(1, 8), st.integers(2, 6), st.integers(0, 99), st.floats(0.01, 50))
def test_weights_sum_to_one_and_follow_the_formula(rows, columns, seed, scale):
    scores = scale * pair(rows, columns, seed)[1]
    weights = difficulty_weights(scores.requires_grad_())
    assert set(weights) == {"hard", "distill"} and not any(w.requires_grad for w in weights.values())
    for w in weights.values():
        assert w.shape == (rows,) and (w >= 0).all() and math.isclose(w.sum().item(), 1, abs_tol=1e-5)
    p = scores.detach().double().softmax(1)
    entropy = -torch.special.xlogy(p, p).sum(1)
    if entropy.sum() > 1e-2:  # below, float32 cannot tell the entropies apart
        assert torch.allclose(weights["hard"].double(), entropy / entropy.sum(), atol=1e-3)
    assert torch.equal(weights["hard"].argmax(), weights["distill"].argmin()) or rows == 1 or weights["distill"].max() - weights["distill"].min() < 1e-5


def test_a_teacher_that_is_sure_of_everything_weighs_all_alike():
    weights = difficulty_weights(torch.tensor([[1000.0, 0, 0], [2000.0, 0, 0]]))
    assert weights["hard"].tolist() == weights["distill"].tolist() == [0.5, 0.5]
    low = difficulty_weights(torch.tensor([[120.0, 0.0], [1.0, 0.0]], dtype=torch.bfloat16))
    assert low["hard"].dtype == torch.float32 and torch.isfinite(low["hard"]).all()


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("dynamic", [True, False])
def test_loss_against_a_loop(alpha, dynamic):
    s, t = pair()
    weights = difficulty_weights(t) if dynamic else dict.fromkeys(("hard", "distill"), torch.full((4,), 0.25))
    distill = contrastive = 0.0
    for i in range(4):
        distill += weights["distill"][i] * sum((t[i, j] - s[i, j]) ** 2 for j in range(5)) / 5
        contrastive += weights["hard"][i] * sum(-F.logsigmoid(s[i, j] if j == 0 else -s[i, j]) for j in range(5)) / 5
    loss = dcd_loss(s, t, alpha=alpha, dynamic=dynamic, temperature=3.0)
    assert torch.isclose(loss["distill"], distill, rtol=1e-4) and torch.isclose(loss["contrastive"], contrastive, rtol=1e-4)
    assert torch.isclose(loss["total"], alpha * distill + (1 - alpha) * contrastive, rtol=1e-4)


def test_gradient_reaches_the_student_only_and_the_official_reduction_ignores_w():
    s, t = pair()
    s.requires_grad_(), t.requires_grad_()
    official = dcd_loss(s, t, official_reduction=True)
    assert torch.isclose(official["distill"], (s - t).square().mean()) and torch.isclose(official["contrastive"], dcd_loss(s, t)["contrastive"])
    official["total"].backward()
    assert t.grad is None and torch.isfinite(s.grad).all() and s.grad.abs().sum() > 0


def test_recall():
    scores = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 2, 2]])
    assert recall_at_k(scores, torch.zeros(3, dtype=torch.long), ks=(1, 2, 3)) == pytest.approx({"R@1": 2 / 3, "R@2": 2 / 3, "R@3": 1.0})
    assert set(recall_at_k(scores, torch.tensor([0, 1, 2]))) == {"R@1", "R@5", "R@10"}


class Bag(nn.Module):
    """Scores (B, C): the image's number times the sum of the caption's words, times a weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.tensor(weight)), []

    def forward(self, images, captions):
        self.seen.append((tuple(captions.shape), torch.is_grad_enabled()))
        return self.weight * images[:, None] * captions.sum(2)


def test_trainer_mines_without_gradient_and_shows_the_student_few():
    teacher, student = Bag(1.0), Bag(0.3)
    images, captions = torch.tensor([1.0, -1.0]), torch.arange(24.0).view(2, 6, 2) / 10
    loss = DCDTrainer(student, teacher, num_negatives=2, alpha=0.5).loss(images, captions)
    assert teacher.seen == [((2, 6, 2), False)] and student.seen == [((2, 3, 2), True)] and not teacher.training
    columns = torch.tensor([[0, 5, 4], [0, 1, 2]])  # the largest sums for +1, the smallest for -1
    expected = dcd_loss(0.3 * images[:, None] * captions.sum(2).gather(1, columns), images[:, None] * captions.sum(2).gather(1, columns), alpha=0.5)
    assert all(torch.isclose(loss[name], expected[name]) for name in expected)
    loss["total"].backward()
    assert student.weight.grad is not None and teacher.weight.grad is None


def test_refusals():
    s, t = pair()
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"num_negatives must be between 1 and the 4 false candidates, got {k}"):
            mine_hard_negatives(t, k)
    with pytest.raises(ValueError, match="teacher_scores must have shape"):
        mine_hard_negatives(t[0], 1)
    for bad in (t[:, :1], t[0], t[:0]):
        with pytest.raises(ValueError, match="teacher_scores must have shape"):
            difficulty_weights(bad)
    with pytest.raises(ValueError, match="same shape"):
        dcd_loss(s, t[:, :4])
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
            dcd_loss(s, t, alpha=alpha)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        dcd_loss(s, t, temperature=0.0)
    with pytest.raises(ValueError, match="num_negatives must be at least 1"):
        DCDTrainer(Bag(1.0), Bag(1.0), num_negatives=0)
    with pytest.raises(ValueError, match="between 1 and the 5 false"):
        DCDTrainer(Bag(1.0), Bag(1.0)).loss(torch.ones(2), torch.ones(2, 6, 2))


def test_models_of_the_paper_preset(root):
    """The notebook's ViLT scorer, with a small ViLT: a teacher, a student of two of its four layers, and one step of each."""
    from PIL import Image
    from transformers import ViltConfig, ViltForImageAndTextRetrieval
    from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil
    from kdbook.models import student_from_teacher
    cells = ["".join(cell["source"]) for cell in json.loads((root / "nbs" / "multimodal" / "dcd.ipynb").read_text())["cells"]]
    names = {"nn": nn, "Tensor": torch.Tensor, "torch": torch}
    exec(next(cell for cell in cells if cell.startswith("class ViltScorer")), names)
    torch.manual_seed(0)
    vilt = ViltForImageAndTextRetrieval(ViltConfig(vocab_size=32, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16,
                                                   max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    pictures = [{"image": Image.new("RGB", (40 + 10 * i, 32), (80 * i, 20, 0))} for i in range(3)]
    processor = ViltImageProcessorPil(size={"shortest_edge": 32}, size_divisor=16)
    small = student_from_teacher(vilt, [0, 3])
    small.vilt.embeddings.requires_grad_(False)
    small.gradient_checkpointing_enable()
    student, teacher = (names["ViltScorer"](model, pictures, processor, pairs=5) for model in (small, vilt))
    images, captions = torch.tensor([2, 0]), torch.randint(1, 32, (2, 4, 6), generator=torch.Generator().manual_seed(0))
    loss = DCDTrainer(student, teacher, num_negatives=2).loss(images, captions)
    loss["total"].backward()
    assert torch.isfinite(loss["total"]) and small.config.num_hidden_layers == 2
    assert small.vilt.encoder.layer[0].attention.attention.query.weight.grad is not None
    with torch.no_grad():
        together = teacher(images, captions)
        assert together.shape == (2, 4) and torch.allclose(together, names["ViltScorer"](vilt, pictures, processor, pairs=100)(images, captions), atol=1e-5)
