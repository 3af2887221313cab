import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdbook.evaluation import (accuracy, bleu, bootstrap_interval, chrf, entity_f1, exact_match, expected_calibration_error, kendall, label_loyalty,
                               macro_f1, pearson, perplexity, probability_loyalty, regression_loyalty, spearman, token_f1, top1_agreement)

seeds = st.integers(0, 10_000)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# accuracy and F1

@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_accuracy_and_macro_f1_by_their_definitions(pairs):
    predictions, labels = map(list, zip(*pairs))
    assert accuracy(predictions, labels) == pytest.approx(sum(p == y for p, y in pairs) / len(pairs))
    scores = []
    for c in set(predictions) | set(labels):
        true_positive = sum(p == y == c for p, y in pairs)
        scores.append(2 * true_positive / (predictions.count(c) + labels.count(c)))
    assert macro_f1(predictions, labels) == pytest.approx(np.mean(scores))


def test_ignored_labels_do_not_count_and_kinds_of_input_agree():
    predictions, labels = torch.tensor([[0, 1], [2, 9]]), torch.tensor([[0, 2], [2, -100]])
    for convert in (lambda x: x, lambda x: x.numpy(), lambda x: x.tolist()):
        assert accuracy(convert(predictions), convert(labels)) == pytest.approx(2 / 3)
        assert macro_f1(convert(predictions), convert(labels)) == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert isinstance(accuracy(predictions, labels), float)


def test_entity_f1():
    gold = [["B-PER", "I-PER", "O"], ["B-LOC", "O", "B-LOC"]]
    assert entity_f1(gold, gold) == 1.0
    assert entity_f1([["B-PER", "I-PER", "O"], ["B-LOC", "O", "O"]], gold) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert entity_f1([["B-LOC", "I-LOC", "O"], ["O", "O", "O"]], gold) == 0.0
    assert entity_f1([["O"]], [["O"]]) == 0.0


# text

@pytest.mark.parametrize("answer, reference, exact, f1", [
    ("The  Cat.", "cat", 1, 1), ("cat", ["dog", "a cat"], 1, 1), ("big cat", "cat", 0, 2 / 3), ("cat", "dog", 0, 0), ("", "", 1, 1), ("", "cat", 0, 0),
    ("cat cat", "cat", 0, 2 / 3),
])
def test_answers(answer, reference, exact, f1):
    assert exact_match([answer], [reference]) == exact
    assert token_f1([answer], [reference]) == pytest.approx(f1)


def test_answers_are_averaged():
    assert exact_match(["x", "y"], ["x", "z"]) == 0.5
    assert token_f1(["x w", "y"], ["x", "z"]) == pytest.approx(1 / 3)


def test_translation_scores_are_those_of_sacrebleu():
    import sacrebleu
    hypotheses, references = ["the cat sat on the mat today", "a dog"], ["the cat sat on a mat today", "the dog ran"]
    assert bleu(hypotheses, references) == sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert chrf(hypotheses, references) == sacrebleu.corpus_chrf(hypotheses, [references]).score
    assert chrf(hypotheses, references, word_order=2) == sacrebleu.corpus_chrf(hypotheses, [references], word_order=2).score
    assert bleu(hypotheses, hypotheses) == pytest.approx(100) and chrf(hypotheses, hypotheses) == pytest.approx(100)


def test_translation_scores_with_different_numbers_of_references():
    assert chrf(["a cat", "dog"], [["a cat"], ["cow", "dog", "pig"]]) == pytest.approx(100)
    assert bleu(["这只猫坐着"], ["这只猫坐着"], tokenize="zh") == pytest.approx(100)


# calibration

def test_calibration_error():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    assert expected_calibration_error(probabilities, torch.tensor([0, 1, 0, 1]), bins=10) == pytest.approx((2 * 0.4 + 0.4 + 0.3) / 4, abs=1e-6)
    assert expected_calibration_error(probabilities[None], torch.tensor([[0, 0, -100, -100]]), bins=10) == pytest.approx(0.1, abs=1e-6)
    assert expected_calibration_error(torch.eye(3), torch.arange(3)) == 0.0


# correlations

@settings(max_examples=40, deadline=None)
@given(st.integers(3, 20), seeds)
def test_correlations_ignore_scale_and_ranks_ignore_monotone_maps(n, seed):
    x, y = normal(n, seed=seed, dtype=torch.float64), normal(n, seed=seed + 1, dtype=torch.float64)
    for f in (pearson, spearman, kendall):
        value = f(x, y)
        assert -1 - 1e-9 <= value <= 1 + 1e-9 and value == pytest.approx(f(y, x), abs=1e-9)
        assert f(2 * x + 1, y) == pytest.approx(value, abs=1e-9) and f(-x, y) == pytest.approx(-value, abs=1e-9)
    for f in (spearman, kendall):
        assert f(x.exp(), y) == pytest.approx(f(x, y), abs=1e-9)
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)


def test_correlations_with_ties_and_constants(recwarn):
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert kendall([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))
    assert all(math.isnan(f([1.0, 1.0], [0.0, 2.0])) for f in (pearson, spearman, kendall))
    assert not len(recwarn)


# loyalty

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(2, 5), seeds)
def test_loyalties_have_their_bounds(n, classes, seed):
    student, teacher = 4 * normal(n, classes, seed=seed), 4 * normal(n, classes, seed=seed + 1)
    value = probability_loyalty(student, teacher).item()
    assert 1 - math.sqrt(math.log(2)) - 1e-6 <= value <= 1
    assert value == pytest.approx(probability_loyalty(teacher, student).item(), abs=1e-5)
    assert probability_loyalty(student, student + 3).item() == pytest.approx(1, abs=2e-3)
    assert probability_loyalty(student, teacher, temperature=1e6).item() == pytest.approx(1, abs=2e-3)
    assert 0 <= label_loyalty(student, teacher) <= 1 and label_loyalty(student, 2 * student) == 1
    assert top1_agreement(student, teacher) == label_loyalty(student, teacher).item()


def test_loyalty_is_one_minus_the_distance_of_scipy():
    from scipy.spatial.distance import jensenshannon
    student, teacher = normal(5, 4), normal(5, 4, seed=1)
    distances = jensenshannon(student.softmax(-1), teacher.softmax(-1), axis=1)
    assert probability_loyalty(student, teacher).item() == pytest.approx(1 - distances.mean(), abs=1e-6)
    mask = torch.tensor([True, False, True, False, False])
    assert probability_loyalty(student, teacher, mask=mask).item() == pytest.approx(1 - distances[mask].mean(), abs=1e-6)


def test_loyalties_give_the_golden_numbers(shared):
    functions = {"label_loyalty": label_loyalty, "probability_loyalty": probability_loyalty, "regression_loyalty": regression_loyalty}
    cases = json.loads((shared / "golden/compression/romanian_bert.json").read_text())["cases"]
    seen = 0
    for case in cases:
        name = case["call"].rsplit(".", 1)[1]
        if name in functions:
            arguments = [torch.tensor(a["tensor"]) for a in case["args"]]
            assert functions[name](*arguments, **case["kwargs"]).item() == pytest.approx(case["expect"], rel=1e-5, abs=1e-6)
            seen += 1
    assert seen >= 3


def test_rank_correlations_give_the_golden_numbers(shared):
    for case in json.loads((shared / "golden/compression/diswot.json").read_text())["cases"]:
        f = {"kendall_tau": kendall, "spearman": spearman}.get(case["call"].rsplit(".", 1)[1])
        if f:
            assert f(*(torch.tensor(a["tensor"]) for a in case["args"])) == pytest.approx(case["expect"], rel=1e-5)


# perplexity

class Table(nn.Module):
    """Logits of the next token that depend on the current one, with dropout, as a stand-in for a language model."""

    def __init__(self, vocab_size=7):
        super().__init__()
        self.table = nn.Parameter(normal(vocab_size, vocab_size))
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask=None):
        logits = self.dropout(self.table[input_ids])
        return logits if attention_mask is None else SimpleNamespace(logits=logits)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(2, 6), seeds)
def test_perplexity_does_not_depend_on_the_cut_into_batches(n, length, seed):
    model = Table().train()
    ids = torch.randint(7, (n, length), generator=torch.Generator().manual_seed(seed))
    log_probs = model.table.detach().log_softmax(-1)[ids[:, :-1], ids[:, 1:]]
    expected = math.exp(-log_probs.mean().item())
    assert perplexity(model, [ids]) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, list(ids[:, None])) == pytest.approx(expected, rel=1e-5)
    assert model.training and model.table.grad is None


def test_perplexity_of_padded_dicts_pairs_and_aligned_labels():
    model = Table()
    ids, mask = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 1, 2]]), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = perplexity(model, [ids[:1, :3], ids[1:]])
    assert perplexity(model, [{"input_ids": ids, "attention_mask": mask}]) == pytest.approx(expected, rel=1e-6)
    assert perplexity(model, [(ids, ids.masked_fill(mask == 0, -100))]) == pytest.approx(expected, rel=1e-6)
    aligned = torch.full_like(ids, -100)
    aligned[:, :-1] = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    assert perplexity(model, [{"input_ids": ids, "labels": aligned}], shift=False) == pytest.approx(expected, rel=1e-6)


def test_perplexity_of_a_transformers_model():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)).eval()
    ids = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))
    assert perplexity(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]) == pytest.approx(model(ids, labels=ids).loss.exp().item(), rel=1e-5)


# bootstrap

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), seeds)
def test_bootstrap_is_deterministic_and_lies_within_the_values(n, seed):
    values = np.random.default_rng(seed).normal(size=n)
    low, high = bootstrap_interval(values, np.mean, 50, seed)
    assert values.min() - 1e-12 <= low <= high <= values.max() + 1e-12
    assert (low, high) == bootstrap_interval(values, np.mean, 50, np.random.default_rng(seed))
    assert (low, high) == pytest.approx(bootstrap_interval(torch.tensor(values), torch.mean, 50, seed))
    assert (low, high) == pytest.approx(bootstrap_interval(values.tolist(), np.mean, 50, seed))


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    intervals = [bootstrap_interval(generator.normal(size=60), np.mean, 200, i, level=0.9) for i in range(200)]
    assert 0.83 <= np.mean([low < 0 < high for low, high in intervals]) <= 0.96


def test_bootstrap_keeps_rows_together():
    rows = np.stack([np.arange(20), np.arange(20)], 1)
    assert bootstrap_interval(rows, lambda r: abs(r[:, 0] - r[:, 1]).max(), 20, 0) == (0.0, 0.0)


@pytest.mark.parametrize("call, words", [
    (lambda: accuracy([1, 2], [1]), "predictions and labels must have the same shape"),
    (lambda: accuracy([], []), "labels must hold at least one"),
    (lambda: macro_f1([1], [-100]), "labels must hold at least one"),
    (lambda: entity_f1([], []), "at least 1 item"),
    (lambda: entity_f1([["O"]], [["O", "O"]]), r"predictions\[0\]"),
    (lambda: exact_match([], []), "at least 1 item"),
    (lambda: exact_match(["a"], [[]]), "references"),
    (lambda: token_f1(["a"], ["a", "b"]), "same length"),
    (lambda: bleu([], []), "at least 1 item"),
    (lambda: chrf(["a"], [""]), "references"),
    (lambda: chrf(["a"], ["a", "b"]), "same length"),
    (lambda: expected_calibration_error(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)), "probabilities must be"),
    (lambda: expected_calibration_error(torch.eye(3), torch.zeros(2, dtype=torch.int64)), "probabilities must be"),
    (lambda: expected_calibration_error(torch.eye(2), torch.tensor([-100, -100])), "labels must hold"),
    (lambda: expected_calibration_error(torch.eye(2), torch.tensor([0, 1]), bins=0), "bins"),
    (lambda: pearson([1.0], [2.0]), "at least 2 items"),
    (lambda: spearman([1.0, 2.0], [2.0]), "same length"),
    (lambda: kendall([[1.0, 2.0]], [[2.0, 1.0]]), "1-D"),
    (lambda: label_loyalty(torch.ones(2, 3), torch.ones(3)), "same shape"),
    (lambda: label_loyalty(torch.ones(0, 3), torch.ones(0, 3)), "nothing counts"),
    (lambda: label_loyalty(torch.ones(2, 3), torch.ones(2, 3), mask=torch.zeros(2, dtype=torch.bool)), "nothing counts"),
    (lambda: probability_loyalty(torch.ones(2, 3), torch.ones(2, 3), mask=torch.zeros(2, dtype=torch.bool)), "nothing counts"),
    (lambda: probability_loyalty(torch.ones(2, 3), torch.ones(2, 4)), "."),
    (lambda: probability_loyalty(torch.ones(2, 3), torch.ones(2, 3), temperature=0), "temperature must be > 0"),
    (lambda: regression_loyalty(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])), "constant"),
    (lambda: perplexity(Table(), []), "batches must hold"),
    (lambda: perplexity(Table(), [torch.ones(2, 1, dtype=torch.int64)]), "batches must hold"),
    (lambda: perplexity(Table(), [torch.ones(2, 3, dtype=torch.int64)], shift=False), "labels must be part"),
    (lambda: bootstrap_interval([], np.mean), "at least one item"),
    (lambda: bootstrap_interval([1.0], np.mean, 0), "n must be at least 1"),
    (lambda: bootstrap_interval([1.0], np.mean, level=1.0), "level"),
])
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
