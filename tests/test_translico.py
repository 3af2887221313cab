"""TransliCo: the contract of its functions, worked numbers, edge cases, and the models of its presets."""
import math
import sys

import pytest
import torch
from hypothesis import given, strategies as st

from conftest import golden
from kdbook.multilingual.translico import masked_mean_pool, mlm_mask, retrieval_accuracy, tcm_loss, translico_loss, transliterate, unicode_name_table


def views(n=5, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)


def slow_tcm(z, other, temperature=1.0, normalize=False):
    """The formula, pair by pair, interleaved as in the paper."""
    u = torch.stack([z, other], 1).flatten(0, 1).double()
    u = u / u.norm(dim=1, keepdim=True) if normalize else u
    total = 0.0
    for a in range(len(u)):
        scores = [float(u[a] @ u[b]) / temperature for b in range(len(u)) if b != a]
        total += math.log(sum(math.exp(s - max(scores)) for s in scores)) + max(scores) - float(u[a] @ u[a ^ 1]) / temperature
    return total / len(u) / 2


def test_golden(shared):
    golden(shared, "multilingual/translico")


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("normalize", [False, True])
def test_tcm_against_the_formula(n, temperature, normalize):
    z, other = views(n)
    assert tcm_loss(z, other, temperature, normalize).item() == pytest.approx(slow_tcm(z, other, temperature, normalize), rel=1e-5, abs=1e-6)


@given(st.integers(1, 9), st.integers(0, 30))
def test_tcm_is_symmetric_and_blind_to_the_order_of_sentences(n, seed):
    z, other = views(n, 4, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(tcm_loss(z, other), tcm_loss(other, z), atol=1e-6)
    assert torch.allclose(tcm_loss(z, other), tcm_loss(z[order], other[order]), atol=1e-6)
    assert tcm_loss(z, other) >= 0


def test_tcm_known_values_and_gradients():
    assert tcm_loss(torch.eye(2), torch.eye(2)).item() == pytest.approx(0.5 * math.log(1 + 2 / math.e))
    assert tcm_loss(torch.zeros(6, 3), torch.zeros(6, 3)).item() == pytest.approx(0.5 * math.log(11))
    z, other = (x.requires_grad_() for x in views(4))
    tcm_loss(z, other).backward()
    assert z.grad.abs().sum() > 0 and other.grad.abs().sum() > 0
    z, other = (x.requires_grad_() for x in views(1))
    loss = tcm_loss(z, other)
    loss.backward()
    assert loss == 0 and torch.isfinite(z.grad).all() and z.grad.abs().sum() == 0


def test_tcm_in_half_precision_and_with_long_vectors():
    z, other = views(4)
    assert tcm_loss(z.bfloat16(), other.bfloat16()).dtype == torch.float32
    assert torch.isfinite(tcm_loss(1e3 * z, 1e3 * other))
    assert torch.allclose(tcm_loss(z, other, normalize=True), tcm_loss(5 * z, other * 3, normalize=True), atol=1e-6)


def test_tcm_refuses():
    z, other = views(4)
    for a, b in ((z, other[:3]), (z, other[:, :5]), (z[0], other[0]), (z[None], other[None])):
        with pytest.raises(ValueError, match="original and transliterated must be"):
            tcm_loss(a, b)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be > 0"):
            tcm_loss(z, other, temperature)


def test_pooling_ignores_what_does_not_count():
    hidden = torch.randn(3, 5, 4)
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 0, 0]]).bool()
    expected = torch.stack([h[m].mean(0) for h, m in zip(hidden, mask)])
    hidden[~mask] = math.nan
    assert torch.allclose(masked_mean_pool(hidden, mask), expected, atol=1e-6)


def test_pooling_refuses():
    hidden, mask = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="every row"):
        masked_mean_pool(hidden, torch.tensor([[True, False, False], [False, False, False]]))
    for wrong in (mask[:, :2], mask.long(), mask[0]):
        with pytest.raises(ValueError, match="mask a bool tensor"):
            masked_mean_pool(hidden, wrong)


def test_masking():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (300, 20), generator=generator)
    special = torch.rand(300, 20, generator=generator) < 0.2
    before = ids.clone()
    corrupted, labels = mlm_mask(ids, special, 1, 50, 0.3, generator)
    chosen = labels != -100
    assert (ids == before).all() and not (chosen & special).any()
    assert (labels[chosen] == ids[chosen]).all() and (corrupted[~chosen] == ids[~chosen]).all()
    assert 0.27 < chosen[~special].float().mean() < 0.33
    assert 0.75 < (corrupted[chosen] == 1).float().mean() < 0.85
    again = mlm_mask(ids, special, 1, 50, 0.3, torch.Generator().manual_seed(7))
    assert all((a == b).all() for a, b in zip(again, mlm_mask(ids, special, 1, 50, 0.3, torch.Generator().manual_seed(7))))
    corrupted, labels = mlm_mask(ids, special, 1, 50, 0.0)
    assert (corrupted == ids).all() and (labels == -100).all()
    assert (mlm_mask(ids, special, 1, 50, 1.0)[1] != -100).equal(~special)


def test_masking_refuses():
    ids, special = torch.randint(5, 50, (3, 4)), torch.zeros(3, 4, dtype=torch.bool)
    for probability in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="mlm_probability must be in"):
            mlm_mask(ids, special, 1, 50, probability)
    for wrong in (special.long(), special[:2]):
        with pytest.raises(ValueError, match="special_mask must be bool"):
            mlm_mask(ids, wrong, 1, 50)
    with pytest.raises(ValueError, match="int64"):
        mlm_mask(ids.int(), special, 1, 50)


def test_sum():
    terms = torch.tensor(1.5, requires_grad=True), torch.tensor(2.0), torch.tensor(4.0)
    assert translico_loss(*terms) == 5.5 and translico_loss(*terms, 0.0) == 3.5 and translico_loss(*terms, tcm_weight=2.0) == 11.5
    assert translico_loss(*terms).requires_grad
    for weight in (-0.1, math.nan):
        with pytest.raises(ValueError, match="tcm_weight must be >= 0"):
            translico_loss(*terms, weight)


@given(st.text(), st.dictionaries(st.characters(), st.text(max_size=3), max_size=5))
def test_transliteration_is_character_by_character(text, table):
    result = transliterate(text, table)
    assert result == "".join(transliterate(c, table) for c in text) and transliterate(text, {}) == text
    assert all(c in result for c in text if c not in table)


@pytest.mark.parametrize("text, expected", [("Щука", "Shchuka"), ("вода 12", "voda 12"), ("Αθήνα", "Athena"), ("سلام", "slam"), ("१९४८", "1948"), ("नमस्ते", "nmste"),
                                            ("한국", "hangug"), ("naïve", "naïve"), ("水", "水"), ("объём", "obem"), ("", "")])
def test_names_of_characters_give_sounds(text, expected):
    assert transliterate(text, unicode_name_table([text])) == expected


def test_the_table_holds_only_what_changes():
    table = unicode_name_table(["abc é 水", "бв"])
    assert table == {"б": "b", "в": "v"} and unicode_name_table([]) == {}


def test_retrieval():
    queries, keys = torch.tensor([[1.0, 0.1], [0.2, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 9.0], [-1.0, 0.0]])
    assert retrieval_accuracy(queries, keys) == 1.0 and isinstance(retrieval_accuracy(queries, keys), float)
    assert retrieval_accuracy(queries.flip(0), keys, 1) == 0.0 and retrieval_accuracy(queries.flip(0), keys, 2) == 1.0
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(30, 5, generator=generator), torch.randn(40, 5, generator=generator)
    by_k = [retrieval_accuracy(a, b, k) for k in range(1, 41)]
    assert by_k == sorted(by_k) and by_k[-1] == 1.0
    assert retrieval_accuracy(a * 3, b * 0.1, 4) == by_k[3]
    assert retrieval_accuracy(a, a) == 1.0


def test_retrieval_refuses():
    a, b = torch.randn(3, 4), torch.randn(5, 4)
    for k in (0, -1, 6):
        with pytest.raises(ValueError, match="k must be between 1 and the 5 keys"):
            retrieval_accuracy(a, b, k)
    with pytest.raises(ValueError, match="at most as many as keys"):
        retrieval_accuracy(b, a)
    with pytest.raises(ValueError, match="at least 1"):
        retrieval_accuracy(a[:0], b)
    for wrong in (b[:, :3], b[0]):
        with pytest.raises(ValueError, match="queries and keys must be"):
            retrieval_accuracy(a, wrong)


def test_the_encoder_of_the_paper_preset_has_what_the_chapter_calls():
    """Glot500 is an XLM-R: body, head and hidden states by the names that the notebook uses, built small."""
    from transformers import AutoConfig, AutoModelForMaskedLM
    config = AutoConfig.for_model("xlm-roberta", vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
                                  max_position_embeddings=20, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    model = AutoModelForMaskedLM.from_config(config)
    ids = torch.randint(4, 40, (3, 8))
    special = torch.zeros_like(ids, dtype=torch.bool)
    special[:, 0] = True
    corrupted, labels = mlm_mask(ids, special, 3, 40, 0.5, torch.Generator().manual_seed(0))
    output = model.base_model(corrupted, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    pooled = masked_mean_pool(output.hidden_states[2], ~special)
    mlm = torch.nn.functional.cross_entropy(model.lm_head(output.last_hidden_state[labels != -100]), labels[labels != -100])
    loss = translico_loss(mlm, mlm, tcm_loss(pooled, pooled.roll(1, 0)))
    loss.backward()
    assert len(output.hidden_states) == 4 and torch.isfinite(loss)


def test_importing_is_light():
    import subprocess
    code = "import sys, kdbook.multilingual.translico; assert not {'transformers', 'datasets', 'pandas', 'uroman'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
