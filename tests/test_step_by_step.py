"""Distilling step-by-step: the contract of its functions, and the presets' models."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from conftest import golden
from kdbook.llm.step_by_step import equation_accuracy, eval_equation, parse_cot, step_by_step_loss, task_prefix_examples


def pair(T, seed, V=7, B=3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[0, -1] = -100
    return torch.randn(B, T, V, generator=generator), labels


def test_golden(shared):
    golden(shared, "llm/step_by_step")


@given(st.floats(0, 1), st.integers(2, 6), st.integers(2, 9), st.integers(0, 100))
def test_against_the_formula(alpha, short, long, seed):
    (z, y), (s, r) = pair(short, seed), pair(long, seed + 1)
    expected = [F.cross_entropy(a.flatten(0, 1), b.flatten(), ignore_index=-100) for a, b in ((z, y), (s, r))]
    assert torch.allclose(step_by_step_loss(z, y, s, r, alpha), alpha * expected[0] + (1 - alpha) * expected[1], atol=1e-6)


def test_the_default_is_half_of_the_papers_sum():
    (z, y), (s, r) = pair(2, 0), pair(5, 1)
    parts = [step_by_step_loss(z, y, s, r, alpha) for alpha in (1.0, 0.0)]
    assert torch.allclose(2 * step_by_step_loss(z, y, s, r), parts[0] + parts[1])


def test_alpha_weighs_the_labels_and_padding_gets_no_gradient():
    (z, y), (s, r) = pair(2, 0), pair(5, 1)
    z.requires_grad_(), s.requires_grad_()
    step_by_step_loss(z, y, s, r, 1.0).backward()
    assert z.grad.abs().sum() > 0 and not s.grad.any() and not z.grad[0, -1].any()


def test_a_longer_rationale_does_not_outweigh_the_label():
    (z, y), (s, r) = pair(2, 0), pair(5, 1)
    assert torch.allclose(step_by_step_loss(z, y, s, r), step_by_step_loss(z, y, s.repeat(1, 9, 1), r.repeat(1, 9)))


def test_refusals_of_the_loss():
    (z, y), (s, r) = pair(2, 0), pair(5, 1)
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
            step_by_step_loss(z, y, s, r, alpha)
    for alpha in (0.0, 0.5, 1.0):
        with pytest.raises(ValueError, match="^labels must count"):
            step_by_step_loss(z, torch.full_like(y, -100), s, r, alpha)
        with pytest.raises(ValueError, match="^rationale_labels must count"):
            step_by_step_loss(z, y, s, torch.full_like(r, -100), alpha)
    with pytest.raises(ValueError, match="^labels must have the shape"):
        step_by_step_loss(z, r, s, r)
    with pytest.raises(ValueError, match="^rationale_labels must have the shape"):
        step_by_step_loss(z, y, s, r[:2])
    with pytest.raises(ValueError, match="labels must be -100 or in"):
        step_by_step_loss(z, y + 7, s, r)


def test_prefixes():
    predict, explain = task_prefix_examples(["a", "b"], ["1", "2"], ["x", "y"])
    assert predict == [("predict: a", "1"), ("predict: b", "2")] and explain == [("explain: a", "x"), ("explain: b", "y")]
    assert task_prefix_examples([], [], []) == ([], [])
    for wrong in ((["a"], [], ["x"]), (["a"], ["1"], []), ([], ["1"], ["x"])):
        with pytest.raises(ValueError, match="same length"):
            task_prefix_examples(*wrong)


@pytest.mark.parametrize("output, expected", [
    ("Because. So the answer is (c) tree hollow.\n\nQ: next", ("Because.", "tree hollow")),
    ("Because.  So the answer is (a) yes", ("Because.", "yes")),
    ("Because. So the answer is tree hollow.", ("Because.", " ")),
    ("Because. So the answer is (a)", ("Because.", " ")),
    ("So the answer is (b) u.s.", ("", "u.s")),
    ("No end to it.", (" ", " ")),
    ("", (" ", " ")),
    ("Q: A. So the answer is (a) b.", (" ", " ")),
    ("So the answer is (a) b. So the answer is (c) d.", (" ", " ")),
])
def test_parsing_multiple_choice(output, expected):
    assert parse_cot(output) == expected


@pytest.mark.parametrize("output, expected", [
    ("Three are eaten. The answer is ( 8.0 - 3.0 ).", ("Three are eaten.", "( 8.0 - 3.0 )")),
    ("R. The answer is ((1 + 2) * (3 - 1)) apples", ("R.", "((1 + 2) * (3 - 1))")),
    ("R. The answer is 5.", ("R.", " ")),
    ("R. The answer is (5). Q: (7)", ("R.", "(5)")),
    ("R. So the answer: 5", (" ", " ")),
])
def test_parsing_equations(output, expected):
    assert parse_cot(output, "The answer is") == expected


def test_an_empty_trigger_is_refused():
    with pytest.raises(ValueError, match="trigger"):
        parse_cot("text", "")


@pytest.mark.parametrize("equation, value", [("( 8.0 - 3.0 )", 5), ("2 * 4", 8), (" 7 ", 7), ("-3 + +1", -2), ("1 / 4", 0.25), ("2 * (3 + 4) - 5 / 2", 11.5)])
def test_equations(equation, value):
    assert eval_equation(equation) == value and type(eval_equation(equation)) is float


@pytest.mark.parametrize("equation", ["", " ", "oops", "1 / 0", "1 +", "2 ** 3", "7 // 2", "7 % 2", "1,000", "(1, 2)", "'1'", "True", "3j", "1 < 2", "x := 1", "[1]", "8 pears",
                                      "abs(1)", "__import__('os')", "1 if 1 else 2", "~1", "1e999", "1e308 * 10", "\0", "9" * 400, "(" * 3000 + "1" + ")" * 3000])
def test_what_is_no_equation_is_nan(equation):
    assert math.isnan(eval_equation(equation))


@given(st.text(max_size=20))
def test_any_text_is_a_number_or_nan(text):
    assert isinstance(eval_equation(text), float)


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_equations_against_python(numbers, random):
    equation = " ".join(f"{random.choice('+-*')} {n}" for n in numbers).lstrip("*+- ")
    assert eval_equation(equation) == eval(equation)


def test_equation_accuracy():
    assert equation_accuracy(["( 8.0 - 3.0 )", "2 * 4", "oops"], ["5", "9", "7"]) == pytest.approx(1 / 3)
    assert equation_accuracy(["oops", ""], ["oops", ""]) == 0
    for wrong in ((["1"], []), ([], ["1"]), ([], []), (["1", "2"], ["1"])):
        with pytest.raises(ValueError, match="predictions and references"):
            equation_accuracy(*wrong)


def test_the_contract_of_names():
    from inspect import signature
    assert list(signature(step_by_step_loss).parameters) == ["label_logits", "labels", "rationale_logits", "rationale_labels", "alpha"]
    assert signature(step_by_step_loss).parameters["alpha"].default == 0.5 and signature(parse_cot).parameters["trigger"].default == "So the answer is"
    assert list(signature(task_prefix_examples).parameters) == ["inputs", "labels", "rationales"]


def test_models_of_the_paper_preset_are_known_classes():
    """T5 v1.1, the class that the names in presets/paper resolve to, built small and run on both tasks; its own generate answers."""
    from kdbook.models import t5
    from kdbook.text import collate_seq2seq
    model = t5(40, width=16, layers=1, heads=2, seed=0)
    predict, explain = [collate_seq2seq([[5, 6, 7], [5, 8]], targets, start_id=0, eos_id=1) for targets in ([[9], [10]], [[9, 11, 12], [10, 11]])]
    logits = [model(**{name: batch[name] for name in batch if name != "labels"}).logits for batch in (predict, explain)]
    loss = step_by_step_loss(logits[0], predict["labels"], logits[1], explain["labels"])
    loss.backward()
    assert torch.isfinite(loss) and model.generate(input_ids=predict["input_ids"], attention_mask=predict["attention_mask"], max_new_tokens=3).shape[0] == 2
