"""Multilingual GNMT: the contract of its functions, and the presets."""
import inspect
import math

import pytest
import torch
from hypothesis import given, strategies as st

from conftest import golden
from kdbook.book.chapters import resolve, select
from kdbook.multilingual import gnmt
from kdbook.multilingual.gnmt import mixed_target_embedding, pivot_translate, prepend_target_token, sampling_probs, target_language_rate, translation_loss


def test_golden(shared):
    golden(shared, "multilingual/gnmt")


def test_signatures_are_the_contract():
    expected = {"prepend_target_token": ["src", "target_lang", "lang_token_ids"], "mixed_target_embedding": ["embedding_weight", "lang_token_ids", "weights"],
                "sampling_probs": ["sizes", "oversample"], "translation_loss": ["logits", "labels", "label_smoothing"],
                "target_language_rate": ["tokens", "token_lang", "lang", "ignore_ids"], "pivot_translate": ["translate", "src", "pivot_lang", "target_lang"]}
    for name, arguments in expected.items():
        assert list(inspect.signature(getattr(gnmt, name)).parameters) == arguments


@given(st.integers(0, 5), st.integers(0, 6), st.integers(0, 99))
def test_the_token_stands_in_front_and_nothing_else_changes(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    src = torch.randint(20, (rows, width), generator=generator)
    wanted = torch.randint(3, (rows,), generator=generator)
    out = prepend_target_token(src, wanted, (31, 30, 35))
    assert out.shape == (rows, width + 1) and out.dtype == torch.int64
    assert torch.equal(out[:, 1:], src) and out[:, 0].tolist() == [(31, 30, 35)[i] for i in wanted]


def test_the_token_refuses():
    src = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="src must have shape"):
        prepend_target_token(src[0], torch.tensor([0]), [4])
    for wrong in (torch.tensor([0]), torch.zeros(2, 1, dtype=torch.int64), torch.tensor(0)):
        with pytest.raises(ValueError, match=r"target_lang must have shape \(2,\)"):
            prepend_target_token(src, wrong, [4])
    for index in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match="target_lang must be between 0 and 1"):
            prepend_target_token(src, torch.tensor(index), [4, 5])
    with pytest.raises(ValueError, match="target_lang must be between"):
        prepend_target_token(src, torch.tensor([0, 0]), [])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5).filter(lambda w: sum(w) > 0.1), st.integers(0, 99))
def test_the_mixed_embedding_is_convex(raw, seed):
    generator = torch.Generator().manual_seed(seed)
    table, tokens = torch.randn(9, 4, generator=generator), list(range(2, 2 + len(raw)))
    weights = torch.tensor(raw) / sum(raw)
    out = mixed_target_embedding(table, tokens, weights)
    assert torch.allclose(out, sum(w * table[t] for w, t in zip(weights, tokens)), atol=1e-6)
    assert (out <= table[tokens].max(0).values + 1e-5).all() and (out >= table[tokens].min(0).values - 1e-5).all()


def test_the_mixed_embedding_has_gradients_and_keeps_the_type_of_the_table():
    table, weights = torch.randn(5, 3, requires_grad=True), torch.tensor([0.25, 0.75], requires_grad=True)
    mixed_target_embedding(table, [1, 4], weights).sum().backward()
    assert torch.allclose(table.grad[[1, 4]], torch.tensor([[0.25], [0.75]]).expand(2, 3)) and not table.grad[[0, 2, 3]].any()
    assert torch.allclose(weights.grad, table.detach()[[1, 4]].sum(1))
    assert mixed_target_embedding(table.detach().double(), [1, 4], weights.detach()).dtype == torch.float64


def test_the_mixed_embedding_refuses():
    table = torch.eye(4)
    with pytest.raises(ValueError, match=r"weights must be >= 0"):
        mixed_target_embedding(table, [1, 2], torch.tensor([1.5, -0.5]))
    for wrong in ([0.5, 0.4], [0.5002, 0.5]):
        with pytest.raises(ValueError, match="weights must sum to 1"):
            mixed_target_embedding(table, [1, 2], torch.tensor(wrong))
    assert torch.allclose(mixed_target_embedding(table, [1, 2], torch.tensor([0.50005, 0.5])).sum(), torch.tensor(1.00005))
    for wrong in ([1.0], [0.5, 0.25, 0.25]):
        with pytest.raises(ValueError, match=r"weights must have shape \(2,\)"):
            mixed_target_embedding(table, [1, 2], torch.tensor(wrong))
    with pytest.raises(ValueError, match="weights"):
        mixed_target_embedding(table, [1, 2], torch.tensor([math.nan, 1.0]))


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=8))
def test_mixture_probabilities(sizes):
    natural, uniform = sampling_probs(sizes), sampling_probs(sizes, oversample=True)
    assert natural.dtype == uniform.dtype == torch.float32
    assert torch.allclose(natural, torch.tensor(sizes, dtype=torch.float64).div(sum(sizes)).float()) and torch.allclose(uniform, torch.full((len(sizes),), 1 / len(sizes)))


@pytest.mark.parametrize("sizes", [[3, 0], [-1], [], [2.0, math.nan]])
@pytest.mark.parametrize("oversample", [False, True])
def test_mixture_refuses(sizes, oversample):
    with pytest.raises(ValueError, match="sizes must be > 0"):
        sampling_probs(sizes, oversample)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_loss_against_the_formula(smoothing):
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[1, 4, -100], [0, -100, -100]])
    target = (1 - smoothing) * torch.nn.functional.one_hot(labels.clamp(min=0), 5) + smoothing / 5
    expected = -(target * logits.log_softmax(-1)).sum(-1)[labels != -100].mean()
    loss = translation_loss(logits, labels, smoothing)
    assert torch.allclose(loss, expected, atol=1e-6)
    loss.backward()
    assert not logits.grad[labels == -100].any() and logits.grad[labels != -100].abs().sum() > 0
    assert torch.allclose(translation_loss(logits[0], labels[0], smoothing), torch.nn.functional.cross_entropy(logits[0, :2], labels[0, :2], label_smoothing=smoothing))


def test_loss_refuses():
    logits = torch.zeros(2, 3, 5)
    with pytest.raises(ValueError):
        translation_loss(logits, torch.full((2, 3), -100))
    with pytest.raises(ValueError):
        translation_loss(logits, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="label_smoothing"):
        translation_loss(logits, torch.zeros(2, 3, dtype=torch.int64), 1.5)


def test_language_rate():
    token_lang = torch.tensor([-1, -1, 0, 0, 1])
    tokens = torch.tensor([[2, 4, 1, 0], [4, 1, 0, -100]])
    assert target_language_rate(tokens, token_lang, 1, (0, 1, -100)) == pytest.approx(2 / 3)
    assert target_language_rate(tokens, token_lang, 0, (0, 1, -100)) == pytest.approx(1 / 3)
    assert target_language_rate(torch.tensor([2, 4, 1]), token_lang, 1) == pytest.approx(1 / 3)  # nothing is ignored unless asked
    assert target_language_rate(torch.tensor([0, 1]), token_lang, 1, [0, 1]) == 0.0
    assert target_language_rate(torch.zeros(0, dtype=torch.int64), token_lang, 1) == 0.0
    assert isinstance(target_language_rate(tokens, token_lang, 1, (0, 1, -100)), float)
    for wrong in (5, -100):
        with pytest.raises(ValueError, match="tokens must be between 0 and 4"):
            target_language_rate(torch.tensor([2, wrong]), token_lang, 0)


def test_the_bridge_takes_two_steps_in_this_order():
    calls = []

    def translate(source, lang):
        calls.append((source.tolist(), lang))
        return source * 10 + lang

    assert pivot_translate(translate, torch.tensor([[1, 2]]), 3, 5).tolist() == [[135, 235]]
    assert calls == [([[1, 2]], 3), ([[13, 23]], 5)]


@pytest.mark.parametrize("preset", ["tiny", "real", "paper"])
def test_presets_fit_the_chapter(root, preset):
    chapter, = select(["multilingual/gnmt"], root)
    values = resolve(chapter, preset)
    assert values["width"] % values["heads"] == 0 and values["bridges"] and max(values["bridges"]) <= 4 * max(0, len(values["languages"]) - 3)
    assert not values["data"].startswith("hub:") or len(values["configs"]) == len(values["languages"]) - 1 and values["zero_data"]


def test_the_models_of_the_presets_can_be_built_and_trained_on(root):
    """The classes and shapes that the presets ask for, at a small width."""
    from kdbook.models import encoder_decoder
    chapter, = select(["multilingual/gnmt"], root)
    for preset in ("real", "paper"):
        values = resolve(chapter, preset)
        model = encoder_decoder(40, width=2 * values["heads"], layers=values["layers"], heads=values["heads"], max_length=values["max_length"] + 1)
        source = torch.randint(4, 36, (2, values["max_length"]))
        inputs = prepend_target_token(source, torch.tensor([0, 1]), [36, 37])
        logits = model(input_ids=inputs, decoder_input_ids=torch.nn.functional.pad(source[:, :-1], (1, 0), value=2)).logits
        translation_loss(logits, source, 0.1).backward()


def test_the_real_preset_reads_its_languages(root, real_data):
    from kdbook.data import load
    chapter, = select(["multilingual/gnmt"], root)
    values = resolve(chapter, "real")
    rows = load(values["data"], "test", lang=values["languages"])
    assert rows.column_names == values["languages"] and len(rows) >= values["test_pairs"]
    assert len(load(values["data"], "train", lang=values["languages"])) >= values["train_pairs"] + values["direct_pairs"]
