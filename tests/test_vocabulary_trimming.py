"""Vocabulary trimming: mining, slicing, id translation, tokenisers, and exactness on small models of every kind."""
from collections import Counter

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from conftest import golden
from kdbook.models import decoder, encoder, encoder_decoder, t5
from kdbook.multilingual.vocabulary_trimming import (TrimmedVocabulary, compression_rate, coverage, mine_vocabulary, trim_embedding, trim_model, trim_tokenizer,
                                                     with_parts)
from kdbook.text import train_tokenizer

TEXTS = ["the lower house", "the lowest house", "a house is lower", "there the others lower the flag"] * 10


def test_golden(shared):
    golden(shared, "multilingual/vocabulary_trimming")


documents = st.lists(st.lists(st.integers(0, 19), max_size=12), max_size=8)


@given(documents, st.integers(0, 4), st.lists(st.integers(0, 19), max_size=4), st.integers(0, 25))
def test_mining_against_a_slow_count(texts, least, special, size):
    counts = Counter(token for document in texts for token in document)
    candidates = sorted((v for v, c in counts.items() if c >= max(1, least)), key=lambda v: (-counts[v], v))
    found = mine_vocabulary(texts, 20, least, None, special)
    assert found.dtype == torch.int64 and found.tolist() == sorted({*candidates, *special})
    if size < len(candidates):
        assert mine_vocabulary(texts, 20, least, size, special).tolist() == sorted({*candidates[:size], *special})
    else:
        with pytest.raises(ValueError, match=f"target_size must be below the {len(candidates)} candidates, got {size}"):
            mine_vocabulary(texts, 20, least, size, special)


def test_mining_takes_tensors_and_refuses_foreign_ids():
    assert mine_vocabulary([torch.tensor([3, 3]), torch.tensor([[1, 1]])], 4).tolist() == [1, 3]
    for texts, special, name in (([[0, 20]], (), "documents"), ([[-1]], (), "documents"), ([[0]], (20,), "special_ids")):
        with pytest.raises(ValueError, match=f"{name} must hold ids between 0 and 19"):
            mine_vocabulary(texts, 20, special_ids=special)
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        mine_vocabulary([], 0)
    with pytest.raises(ValueError, match="target_size"):
        mine_vocabulary([[1, 1]], 4, target_size=-1)


def test_coverage():
    assert coverage([[1, 2], [2, 3, 3]], torch.tensor([2, 3])) == 4 / 5
    assert coverage([[1]], torch.tensor([2])) == 0
    for empty in ([], [[]], [[], []]):
        with pytest.raises(ValueError, match="at least one token"):
            coverage(empty, torch.tensor([1]))


@given(st.permutations(range(9)), st.integers(1, 9), st.lists(st.integers(0, 30), min_size=1, max_size=20))
def test_translation_there_and_back(order, size, ids):
    keep = torch.tensor(order[:size])
    vocabulary = TrimmedVocabulary(keep, unk_id=order[0])
    ids = torch.tensor(ids)
    new = vocabulary.encode(ids)
    assert vocabulary.size() == size and new.dtype == torch.int64 and new.shape == ids.shape
    kept = torch.isin(ids, keep)
    assert torch.equal(vocabulary.decode(new), torch.where(kept, ids, order[0]))


def test_translation_errors():
    with pytest.raises(ValueError, match="unk_id must be one of keep_ids, got 3"):
        TrimmedVocabulary(torch.tensor([0, 1]), 3)
    for keep in ([1, 1], [], [[0, 1]], [-1, 0]):
        with pytest.raises(ValueError, match="keep_ids"):
            TrimmedVocabulary(torch.tensor(keep, dtype=torch.int64), 1)
    vocabulary = TrimmedVocabulary(torch.tensor([0, 4]), 0)
    with pytest.raises(ValueError, match="ids must be >= 0, got -100"):
        vocabulary.encode(torch.tensor([-100]))
    with pytest.raises(ValueError, match="ids must be between 0 and 1, got 2"):
        vocabulary.decode(torch.tensor([2]))
    assert vocabulary.encode(torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_rates():
    assert compression_rate(300, 20, 5, 10) == {"full": 50.0, "embedding": 25.0}
    assert compression_rate(400, 20, 10, 10, tied=False) == {"full": 50.0, "embedding": 50.0}
    assert compression_rate(300, 20, 20, 10) == {"full": 100.0, "embedding": 100.0}
    for arguments, name in (((300, 20, 21, 10), "n_kept"), ((300, 20, -1, 10), "n_kept"), ((10, 20, 5, 10), "n_params"), ((300, 0, 0, 10), "vocab_size"), ((300, 20, 5, 0), "hidden_size")):
        with pytest.raises(ValueError, match=name):
            compression_rate(*arguments)


@pytest.mark.parametrize("make", [lambda: decoder(30, width=16, layers=1, heads=2), lambda: encoder(30, width=16, layers=1, heads=2),
                                  lambda: encoder_decoder(30, width=16, layers=1, heads=2), lambda: t5(30, width=16, layers=1, heads=2)])
def test_logits_of_covered_texts_are_the_same_and_the_formula_counts_right(make):
    torch.manual_seed(0)
    model = make().eval()
    keep = torch.tensor([0, 1, 2, 3, 4, 7, 11, 20, 29])
    small = trim_model(model, keep)
    new = torch.tensor([[5, 8, 6, 7], [7, 7, 1, 5]])
    old = keep[new]
    inputs = {"input_ids": old, **({"decoder_input_ids": old} if model.config.is_encoder_decoder else {})}
    new_inputs = {name: new for name in inputs}
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits[..., keep], small(**new_inputs).logits, atol=1e-6)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    removed = 21 * (16 if tied else 32) + (21 if getattr(model.get_output_embeddings(), "bias", None) is not None else 0)
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters()) == removed
    assert (small.get_input_embeddings().weight is small.get_output_embeddings().weight) == tied
    assert len(model.get_input_embeddings().weight) == 30, "the argument is unchanged"


class Plain(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.table, self.place, self.inner, self.out = nn.Embedding(12, 4, padding_idx=1), nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 12)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, ids):
        return self.out(self.inner(self.table(ids) + self.place(torch.arange(ids.shape[1]))))


@pytest.mark.parametrize("tied", [True, False])
def test_a_module_that_is_no_transformers_model(tied):
    torch.manual_seed(0)
    model, keep = Plain(tied), torch.tensor([11, 1, 3])
    small = trim_model(model, keep)
    new = torch.tensor([[0, 2, 1], [2, 2, 0]])
    assert torch.allclose(small(new), model(keep[new])[..., keep], atol=1e-6)
    assert (small.out.weight is small.table.weight) == tied and small.table.padding_idx == 1 and small.out.out_features == small.table.num_embeddings == 3
    assert len(small.place.weight) == 5 and len(model.table.weight) == 12
    small.table.weight.data.zero_()
    assert model.table.weight.abs().sum() > 0, "the copy shares no memory"
    with pytest.raises(ValueError, match="padding id"):
        trim_model(model, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="keep_ids"):
        trim_model(model, torch.tensor([1, 12]))
    with pytest.raises(ValueError, match="nn.Embedding"):
        trim_model(nn.Linear(3, 3), torch.tensor([0]))


def test_rows():
    weight = torch.arange(12.0).view(6, 2)
    assert trim_embedding(weight, torch.tensor([4, 0])).tolist() == [[8.0, 9.0], [0.0, 1.0]]
    for bad in ([0, 0], [6], [-1]):
        with pytest.raises(ValueError, match="keep_ids"):
            trim_embedding(weight, torch.tensor(bad))


def unigram():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=60, special_tokens=["<pad>", "<unk>", "<s>", "</s>", "<mask>"], unk_token="<unk>", show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>", mask_token="<mask>")


TOKENIZERS = {"word": lambda: train_tokenizer(TEXTS, kind="word", frame=True), "char": lambda: train_tokenizer(TEXTS, kind="char"),
              "bpe": lambda: train_tokenizer(TEXTS, kind="bpe", vocab_size=320, frame=True), "unigram": unigram}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_covered_texts_are_cut_as_before(kind):
    tokenizer = TOKENIZERS[kind]()
    mined = mine_vocabulary(tokenizer(TEXTS[:3], add_special_tokens=False)["input_ids"], len(tokenizer), min_frequency=1, special_ids=tokenizer.all_special_ids)
    keep = with_parts(tokenizer, mined)
    small = trim_tokenizer(tokenizer, keep)
    vocabulary = TrimmedVocabulary(keep, tokenizer.unk_token_id)
    assert len(small) == len(keep) < len(tokenizer)
    for line in TEXTS[:3]:
        assert small(line)["input_ids"] == vocabulary.encode(torch.tensor(tokenizer(line)["input_ids"])).tolist()
        assert small.decode(small(line)["input_ids"], skip_special_tokens=True) == tokenizer.decode(tokenizer(line)["input_ids"], skip_special_tokens=True)
    assert small.all_special_tokens == tokenizer.all_special_tokens and small.pad_token_id == vocabulary.encode(torch.tensor(tokenizer.pad_token_id))


def test_a_lost_piece_is_spelled_or_unknown():
    bpe, word = TOKENIZERS["bpe"](), TOKENIZERS["word"]()
    small = trim_tokenizer(bpe, torch.arange(5 + 256))
    assert small.decode(small("the lowest flag")["input_ids"], skip_special_tokens=True) == "the lowest flag"
    keep = torch.tensor(sorted({*word.all_special_ids, *word("the house", add_special_tokens=False)["input_ids"]}))
    small = trim_tokenizer(word, keep)
    assert small.tokenize("the lowest house") == ["the", "<unk>", "house"]


def test_parts_are_needed_for_byte_pairs_only():
    bpe = TOKENIZERS["bpe"]()
    piece = bpe.convert_tokens_to_ids("Ġhouse")
    closed = with_parts(bpe, torch.tensor([0, 1, 2, 3, 4, piece]))
    assert {"Ġ", "h", "o", "u", "s", "e", "Ġhouse"} <= {bpe.convert_ids_to_tokens(i) for i in closed.tolist()}
    assert trim_tokenizer(bpe, closed).tokenize(" house") == ["Ġhouse"]
    assert torch.equal(with_parts(bpe, closed), closed)
    assert with_parts(TOKENIZERS["word"](), torch.tensor([7, 3])).tolist() == [3, 7]


def test_tokenizer_errors():
    word = TOKENIZERS["word"]()
    with pytest.raises(ValueError, match="keep_ids must hold the special tokens, but <pad>"):
        trim_tokenizer(word, torch.arange(1, len(word)))
    with pytest.raises(ValueError, match="keep_ids"):
        trim_tokenizer(word, torch.tensor([0, 1, 2, 3, 4, len(word)]))
