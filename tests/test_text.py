"""kdbook.text: tokenizers, windows, labels, generation, trimming."""
import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from kdbook import models as M
from kdbook import text as X

GENERATOR = lambda seed=0: torch.Generator().manual_seed(seed)  # noqa: E731
IDS = torch.randint(4, 40, (3, 6), generator=GENERATOR())


# ---- tokenizers ---------------------------------------------------------------------------------------------------------------------------------------
def test_special_ids_are_the_same_for_every_kind():
    for kind, size in (("char", None), ("word", None), ("bpe", 270)):
        tokenizer = X.train_tokenizer(["some words, some more"], kind, size)
        ids = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id]
        assert ids == [0, 1, 2, 3, 4] and tokenizer.convert_ids_to_tokens(range(5)) == list(X.SPECIAL_TOKENS)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_characters_round_trip_exactly(text):
    tokenizer = X.train_tokenizer(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(ids) == len(text) and 1 not in ids and len(tokenizer) == 5 + len(set(text))


BYTES = None


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_byte_pairs_round_trip_any_text(text):
    global BYTES
    BYTES = BYTES or X.train_tokenizer("the cat sat on the mat", "bpe", 280)
    assert BYTES.decode(BYTES.encode(text)) == text


def test_text_that_looks_like_a_special_token_is_text():
    for kind, size in (("char", None), ("bpe", 300)):
        tokenizer = X.train_tokenizer("a<pad>b<eos>", kind, size)
        ids = tokenizer.encode("<pad>a<eos>")
        assert min(ids) > 4 and tokenizer.decode(ids, skip_special_tokens=True) == "<pad>a<eos>"
    words = X.train_tokenizer("one <pad> two <odd>", "word")
    assert words.encode("one <pad> <odd> two<eos>") == [6, 1, 1, 5, 1, 1] and words.decode([6, 5]) == "one <odd>"


def test_words_split_at_white_space_and_the_rare_ones_go_first():
    tokenizer = X.train_tokenizer(["b a", "b  c\nb a"], "word", 7)
    assert tokenizer.get_vocab() == {**{t: i for i, t in enumerate(X.SPECIAL_TOKENS)}, "b": 5, "a": 6}
    assert tokenizer.encode("a b\tc") == [6, 5, 1]
    assert tokenizer.decode([6, 5]) == "a b"


def test_ties_do_not_depend_on_the_order_of_the_texts():
    texts = ["z y x", "m n o p", "aa bb"]
    for kind, size in (("char", None), ("char", 9), ("word", None), ("word", 8), ("bpe", 290)):
        assert X.train_tokenizer(texts, kind, size).get_vocab() == X.train_tokenizer(texts[::-1], kind, size).get_vocab()


def test_byte_pairs_are_the_same_in_every_process():
    code = ("from kdbook.text import train_tokenizer; import hashlib, json;"
            "t = train_tokenizer(['she sells sea shells by the sea shore, he sells she'] * 3, 'bpe', 290);"
            "print(hashlib.sha256(t.backend_tokenizer.to_str().encode()).hexdigest())")
    first, second = (subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120).stdout for _ in range(2))
    assert first == second and len(first) == 65


def test_frame():
    tokenizer = X.train_tokenizer("abc", frame=True)
    assert tokenizer.encode("ab") == [2, 5, 6, 3] and tokenizer("a", "c").input_ids == [2, 5, 3, 7, 3]
    assert tokenizer.encode("ab", add_special_tokens=False) == [5, 6] and X.train_tokenizer("abc").encode("ab") == [5, 6]


def test_saving_keeps_the_tokenizer(tmp_path):
    tokenizer = X.train_tokenizer("to be or not", frame=True)
    tokenizer.save_pretrained(tmp_path)
    again = X.pretrained_tokenizer(str(tmp_path))
    assert again.encode("<pad> to be") == tokenizer.encode("<pad> to be") and again.mask_token_id == 4
    with pytest.raises(FileNotFoundError, match="hf download someone/thing --revision r1"):
        X.pretrained_tokenizer("someone/thing", revision="r1", local_only=True)


@pytest.mark.parametrize("args, message", [
    (("abc", "letters"), "kind must be 'char', 'word' or 'bpe', got 'letters'"),
    (("",), "texts must hold at least one character, got none"),
    (([" ", "\n"], "word"), "texts must hold at least one word, got none"),
    (("abc", "char", 5), "vocab_size must be at least 6 for kind 'char', got 5"),
    (("abc", "bpe", 260), "vocab_size must be at least 261 for kind 'bpe', got 260"),
])
def test_tokenizers_refuse_what_cannot_be_meant(args, message):
    with pytest.raises(ValueError) as error:
        X.train_tokenizer(*args)
    assert message in str(error.value)


def test_tiny_shakespeare(real_data):
    shakespeare = (real_data / "tiny_shakespeare" / "input.txt").read_text(encoding="utf-8")
    tokenizer = X.train_tokenizer(shakespeare)
    assert len(tokenizer) == 70  # 65 characters
    ids = torch.tensor(tokenizer.encode(shakespeare))
    assert len(ids) == len(shakespeare) == 1_115_394
    train, validation, test = X.split_by_position(ids)
    assert (len(train), len(validation), len(test)) == (1_003_855, 55_769, 55_770)
    assert tokenizer.decode(validation[:200]) == shakespeare[len(train):len(train) + 200]
    assert X.text_blocks(test, 128).shape == (len(test) // 128, 128)
    pairs = X.train_tokenizer(shakespeare[:100_000], "bpe", 400)
    assert len(pairs) == 400 and pairs.decode(pairs.encode(shakespeare[-2000:])) == shakespeare[-2000:]


# ---- windows ----------------------------------------------------------------------------------------------------------------------------------------------
@given(st.integers(0, 300), st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
def test_parts_together_are_the_text(size, weights):
    ids = torch.arange(size)
    parts = X.split_by_position(ids, [w / sum(weights) for w in weights])
    assert torch.equal(torch.cat(parts), ids) and len(parts) == len(weights)
    assert all(abs(len(part) - size * w / sum(weights)) <= 1 for part, w in zip(parts, weights))


@given(st.integers(1, 50), st.integers(1, 60))
def test_blocks(length, size):
    if length > size:
        with pytest.raises(ValueError, match="length must be between 1 and"):
            X.text_blocks(torch.arange(size), length)
    else:
        blocks = X.text_blocks(torch.arange(size), length)
        assert blocks.shape == (size // length, length) and torch.equal(blocks.flatten(), torch.arange(size // length * length))


def test_causal_batches_are_windows_and_deterministic():
    ids = torch.arange(100)
    windows = X.causal_batches(ids, 16, 10, steps=40, seed=3)
    seen = list(windows)
    assert len(windows) == len(seen) == 40 and all(batch.shape == (16, 10) for batch in seen)
    assert all(((batch[:, 1:] - batch[:, :-1]) == 1).all() for batch in seen)
    starts = torch.cat([batch[:, 0] for batch in seen])
    assert starts.min() == 0 and starts.max() == 90  # the first and the last window can be drawn
    state = torch.random.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(seen, windows)) and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(seen[17:], windows.starting_at(17), strict=True))
    assert not torch.equal(seen[0], next(iter(X.causal_batches(ids, 16, 10, steps=1, seed=4))))
    assert next(iter(X.causal_batches(ids[:10], 2, 10, steps=1))).tolist() == [list(range(10))] * 2


@pytest.mark.parametrize("call, message", [
    (lambda: X.causal_batches(torch.arange(5), 2, 6, steps=1), "length must be between 1 and the number of ids"),
    (lambda: X.causal_batches(torch.arange(5), 0, 2, steps=1), "batch_size and steps must be at least 1, got 0 and 1"),
    (lambda: X.split_by_position(torch.arange(5), (0.5, 0.4)), "fractions must be >= 0 and sum to 1, got (0.5, 0.4)"),
    (lambda: X.split_by_position(torch.ones(2, 2)), "ids must be one-dimensional, got shape (2, 2)"),
])
def test_windows_refuse(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_fit_resumes_with_causal_batches(tmp_path):
    from kdbook.training import fit
    def loss(model, ids):
        fit_calls.append(1)
        if len(fit_calls) == 7 and crash:
            raise KeyboardInterrupt
        return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    data = X.causal_batches(torch.arange(60) % 12, 4, 8, steps=10, seed=0)
    build = lambda: M.decoder(12, width=8, heads=2, layers=1, max_length=8, seed=0)  # noqa: E731
    fit_calls, crash = [], False
    fit(whole := build(), data, loss, steps=10)
    fit_calls, crash = [], True
    with pytest.raises(KeyboardInterrupt):
        fit(build(), data, loss, steps=10, checkpoint=tmp_path / "c.pt", checkpoint_every=5)
    fit(resumed := build(), data, loss, steps=10, checkpoint=tmp_path / "c.pt", checkpoint_every=5)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


# ---- labels and collation --------------------------------------------------------------------------------------------------------------------------------------
def test_mask_prompt_contract():
    ids = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]])
    assert X.mask_prompt(ids, torch.tensor([2, 0])).tolist() == [[-100, -100, 7, -100], [5, 6, 7, 8]]
    assert X.mask_prompt(ids, torch.tensor([4, 4])).eq(-100).all()
    assert X.mask_prompt(ids, torch.tensor([0, 1]), pad_id=8).tolist() == [[5, 6, 7, 0], [-100, 6, 7, -100]]
    assert ids[0, 0] == 5  # unchanged
    for wrong in ([-1, 0], [0, 5]):
        with pytest.raises(ValueError, match="prompt_lengths must be between 0 and 4"):
            X.mask_prompt(ids, torch.tensor(wrong))
    with pytest.raises(ValueError, match=r"prompt_lengths must have shape \(2,\)"):
        X.mask_prompt(ids, torch.tensor([1]))


def test_pad_rows():
    assert [t.tolist() for t in X.pad_rows([[1, 2], [3], []], 9)] == [[[1, 2], [3, 9], [9, 9]], [[1, 1], [1, 0], [0, 0]]]
    assert [t.tolist() for t in X.pad_rows([[1, 2], [3]], 9, side="left")] == [[[1, 2], [9, 3]], [[1, 1], [0, 1]]]
    with pytest.raises(ValueError, match="side must be 'right' or 'left'"):
        X.pad_rows([[1]], side="both")


@settings(max_examples=80)
@given(st.lists(st.tuples(st.lists(st.integers(4, 9), max_size=5), st.lists(st.integers(4, 9), max_size=5)), min_size=1, max_size=4),
       st.one_of(st.none(), st.integers(1, 12)), st.booleans())
def test_collate_causal_counts_the_response_and_its_end_only(pairs, max_length, end):
    prompts, responses = zip(*pairs)
    eos = 3 if end else None
    batch = X.collate_causal(prompts, responses, eos_id=eos, pad_id=3, max_length=max_length)  # padding and end share an id
    for row, (prompt, response) in enumerate(pairs):
        full = response + [3] * end
        wanted = full if max_length is None else (response[:max(0, max_length - end)] + [3] * end)
        labels = batch["labels"][row]
        assert labels[labels != -100].tolist() == wanted
        text = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
        assert text == (prompt + wanted if max_length is None else (prompt + wanted)[max(0, len(prompt) - max(0, max_length - len(wanted))):])
        if max_length is not None:
            assert len(text) <= max_length
    counted = batch["labels"] != -100
    assert torch.equal(batch["labels"][counted], batch["input_ids"][counted])


def test_collate_seq2seq_shifts_the_target():
    batch = X.collate_seq2seq([[4, 5, 6], [7]], [[8, 9], []], start_id=2, eos_id=3)
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[4, 5, 6], [7, 0, 0]], "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[8, 9, 3], [3, -100, -100]], "decoder_input_ids": [[2, 8, 9], [2, 0, 0]]}
    cut = X.collate_seq2seq([[4, 5, 6]], [[8, 9, 7]], max_source=2, max_target=2)
    assert cut["input_ids"].tolist() == [[4, 5]] and cut["labels"].tolist() == [[8, 3]]
    for model in (M.encoder_decoder(12, width=8, heads=2, layers=1, max_length=8, seed=0), M.t5(12, width=8, heads=2, layers=1, seed=0)):
        out = model(**batch)
        assert torch.allclose(out.loss, F.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten()))
    with pytest.raises(ValueError, match="sources and targets must be equally many"):
        X.collate_seq2seq([[1]], [])


# ---- choosing a token ---------------------------------------------------------------------------------------------------------------------------------------------
def slow_nucleus(p, top_p):
    """One row at a time, by the definition."""
    order, total, kept = sorted(range(len(p)), key=lambda i: (-p[i], i)), 0.0, []
    for i in order:
        kept.append(i)
        total += p[i]
        if total >= top_p:
            break
    return [p[i] / sum(p[j] for j in kept) if i in kept else 0.0 for i in range(len(p))]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=8).filter(any), st.integers(1, 16))
def test_nucleus_against_the_definition(weights, sixteenths):
    p = torch.tensor(weights, dtype=torch.float64) / 2 ** 6  # sums of these are exact
    top_p = sixteenths / 16 * float(p.sum())
    if top_p > 1 or top_p <= 0:
        return
    assert torch.allclose(X.top_p_filter(p, top_p), torch.tensor(slow_nucleus(p.tolist(), top_p), dtype=torch.float64)) or top_p == 1


def test_nucleus_agrees_with_transformers():
    from transformers.generation.logits_process import TopPLogitsWarper
    logits = torch.randn(50, 30, generator=GENERATOR()) * 3
    for top_p in (0.1, 0.5, 0.9, 0.99):
        theirs = TopPLogitsWarper(top_p)(None, logits).softmax(-1)
        assert torch.allclose(X.top_p_filter(logits.softmax(-1), top_p), theirs, atol=1e-6)
    assert X.top_p_filter(torch.tensor([[0.5, 0.5]]), 1e-6).tolist() == [[1.0, 0.0]]
    for wrong in (0, 1.1):
        with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\]"):
            X.top_p_filter(torch.ones(2) / 2, wrong)


# ---- generation ------------------------------------------------------------------------------------------------------------------------------------------------------
def build_decoder(**options):
    return M.decoder(40, width=16, heads=2, max_length=16, seed=0, init_std=0.3, **options)


def theirs(model, ids, **options):
    return model.eval().generate(ids, attention_mask=options.pop("attention_mask", torch.ones_like(ids)), do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("build", [build_decoder, lambda: M.moe_decoder(40, width=16, heads=2, max_length=16, seed=0, init_std=0.3)])
def test_greedy_equals_transformers_and_the_slow_way(build):
    model = build()
    ours = X.generate(model, IDS, max_new_tokens=8)
    assert torch.equal(ours, theirs(model, IDS, max_new_tokens=8))
    assert torch.equal(ours, X.generate(lambda ids: model(ids).logits, IDS, max_new_tokens=8))
    assert torch.equal(ours, X.generate(lambda ids: model(ids), IDS, max_new_tokens=8))
    assert len(set(map(tuple, ours[:, 6:].tolist()))) > 1  # the rows differ, so the test can fail


def test_rows_after_the_end_are_filled_exactly():
    model = build_decoder()
    free = X.generate(model, IDS, max_new_tokens=8)
    eos = free[0, 8].item()  # a token that the first row writes
    ours = X.generate(model, IDS, max_new_tokens=8, eos_id=eos, pad_id=0)
    reference = theirs(model, IDS, max_new_tokens=8, eos_token_id=eos)
    assert torch.equal(ours[:, :reference.shape[1]], reference) and (ours[:, reference.shape[1]:] == 0).all() and ours.shape == (3, 14)
    for row, text in zip(free, X.generate(model, IDS, max_new_tokens=8, eos_id=eos)):
        new, expected = text[6:].tolist(), row[6:].tolist()
        stop = expected.index(eos) + 1 if eos in expected else 8
        assert new == expected[:stop] + [eos] * (8 - stop)


def test_an_end_token_in_the_prompt_does_not_stop_a_row():
    prompt = torch.tensor([[0, 3]])
    counting = lambda ids: 5.0 * F.one_hot((ids + 1) % 6, 6).float()  # noqa: E731
    assert X.generate(counting, prompt, max_new_tokens=4, eos_id=0).tolist() == [[0, 3, 4, 5, 0, 0]]


def test_a_finished_batch_stops_calling_the_model():
    calls = []
    def model(ids):
        calls.append(ids.shape[1])
        return F.one_hot(torch.full_like(ids, 2), 5).float()
    assert X.generate(model, IDS[:2], max_new_tokens=50, eos_id=2).shape == (2, 56) and calls == [6]


@pytest.mark.parametrize("new", [11, 20])
def test_a_text_longer_than_the_context_is_cut_on_the_left(new):
    model = build_decoder()
    ours = X.generate(model, IDS, max_new_tokens=new)
    assert torch.equal(ours, X.generate(lambda ids: model(ids).logits, IDS, max_new_tokens=new, max_length=16))
    seen = []
    X.generate(lambda ids: seen.append(ids.shape[1]) or model(ids).logits, IDS, max_new_tokens=12, max_length=4)
    assert set(seen) == {4}
    short = X.generate(model, IDS, max_new_tokens=5, max_length=4)
    assert torch.equal(short, X.generate(lambda ids: model(ids).logits, IDS, max_new_tokens=5, max_length=4))


@pytest.mark.parametrize("build", [build_decoder, lambda: M.moe_decoder(40, width=16, heads=2, max_length=16, seed=0, init_std=0.3)])
def test_left_padded_prompts_continue_as_they_would_alone(build):
    model, rows = build(), [[5, 6, 7, 8], [9], [10, 11]]
    ids, mask = X.pad_rows(rows, side="left")
    together = X.generate(model, ids, max_new_tokens=6, attention_mask=mask)
    assert torch.equal(together, theirs(model, ids, attention_mask=mask, max_new_tokens=6))
    for row, text in zip(rows, together):
        assert torch.equal(text[-6:], X.generate(model, torch.tensor([row]), max_new_tokens=6)[0, -6:])
    crossing = X.generate(model, ids, max_new_tokens=20, attention_mask=mask)  # beyond the context
    assert torch.equal(crossing[:, :10], together)


def test_draws_depend_on_the_generator_alone():
    model = build_decoder(dropout=0.3).train()
    state = torch.random.get_rng_state()
    options = dict(max_new_tokens=6, temperature=1.5, top_p=0.9)
    first, again = (X.generate(model, IDS, generator=GENERATOR(1), **options) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, X.generate(model, IDS, generator=GENERATOR(2), **options))
    assert torch.equal(state, torch.random.get_rng_state()) and model.training  # dropout was off, the mode is back


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    model = lambda ids: logits.expand(*ids.shape, 4)  # noqa: E731
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.8)):
        drawn = X.generate(model, torch.zeros(20000, 1, dtype=torch.long), max_new_tokens=1, temperature=temperature, top_p=top_p, generator=GENERATOR())[:, 1]
        expected = X.top_p_filter((logits / temperature).softmax(-1), top_p)
        assert (torch.bincount(drawn, minlength=4) / 20000 - expected).abs().max() < 0.015
        assert (torch.bincount(drawn, minlength=4)[expected == 0] == 0).all()


def test_a_small_temperature_is_greedy():
    model = build_decoder()
    assert torch.equal(X.generate(model, IDS, max_new_tokens=5, temperature=1e-4, generator=GENERATOR()), X.generate(model, IDS, max_new_tokens=5))


def test_recurrent_decoders_keep_their_state():
    model, state = M.GRUDecoder(40, width=16, embedding=8, seed=0), torch.randn(3, 16, generator=GENERATOR())
    assert torch.equal(X.generate(model, IDS, max_new_tokens=7, state=state), X.generate(lambda ids: model(ids, state), IDS, max_new_tokens=7))
    options = dict(max_new_tokens=7, temperature=1.0)
    assert torch.equal(X.generate(model, IDS, state=state, generator=GENERATOR(), **options), X.generate(lambda ids: model(ids, state)[0], IDS, generator=GENERATOR(), **options))


def test_no_gradients_and_a_mode_that_comes_back_after_an_error():
    model = build_decoder().train()
    assert not X.generate(model, IDS, max_new_tokens=2).requires_grad and model.training
    with pytest.raises(IndexError):
        X.generate(model, IDS + 1000, max_new_tokens=2)
    assert model.training


@pytest.mark.parametrize("options, message", [
    ({"temperature": 1.0}, "generator must be given when temperature > 0, got None"),
    ({"temperature": -1.0}, "temperature must be >= 0 and top_p in (0, 1], got -1.0 and 1.0"),
    ({"top_p": 0.0}, "got 0.0 and 0.0"),
    ({"max_new_tokens": 0}, "max_new_tokens >= 1, got (3, 6) and 0"),
    ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]] * 3)}, "padding on the left"),
])
def test_generate_refuses(options, message):
    with pytest.raises(ValueError) as error:
        X.generate(build_decoder(), IDS, **{"max_new_tokens": 2, **options})
    assert message in str(error.value)


def test_generate_refuses_models_that_it_cannot_run():
    with pytest.raises(ValueError, match="MBartForConditionalGeneration is an encoder-decoder: use its own generate"):
        X.generate(M.encoder_decoder(40, width=8, heads=2, layers=1), IDS, max_new_tokens=1)
    with pytest.raises(ValueError, match="attention_mask must be None"):
        X.generate(lambda ids: F.one_hot(ids, 40).float(), IDS, max_new_tokens=1, attention_mask=torch.ones_like(IDS))


# ---- trimming ------------------------------------------------------------------------------------------------------------------------------------------------------------
KEEP = torch.tensor([0, 1, 2, 3, 4, 7, 9, 11, 20, 21, 30, 39])


class Tagger(nn.Module):
    """A body from the library under a head of its own, as chapters build them."""

    def __init__(self):
        super().__init__()
        self.body, self.head = M.encoder(40, width=16, heads=2, max_length=8, head=None, seed=0), nn.Linear(16, 40)

    def forward(self, ids):
        return self.head(self.body(ids).last_hidden_state)


MODELS = {
    "decoder": lambda: M.decoder(40, width=16, heads=2, max_length=8, pad_id=0, eos_id=3, seed=0),
    "forty positions": lambda: M.decoder(40, width=16, heads=2, max_length=40, seed=0),
    "forty wide": lambda: M.decoder(40, width=40, heads=2, max_length=8, seed=0),
    "moe": lambda: M.moe_decoder(40, width=16, heads=2, max_length=8, seed=0),
    "mlm": lambda: M.encoder(40, width=16, heads=2, max_length=8, seed=0),
    "gru": lambda: M.GRUDecoder(40, width=8, embedding=4, seed=0),
    "mbart": lambda: M.encoder_decoder(40, width=16, heads=2, max_length=8, seed=0),
    "t5": lambda: M.t5(40, width=16, heads=2, seed=0),
}


def scores(name, model, ids):
    if name in ("mbart", "t5"):
        return model(input_ids=ids, decoder_input_ids=ids).logits
    if name == "gru":
        return model(ids, torch.ones(len(ids), 8))[0]
    return model(ids).logits


@pytest.mark.parametrize("name", MODELS)
def test_trimming_leaves_the_scores_of_kept_tokens_alone(name):
    model = MODELS[name]().eval()
    if name == "mbart":
        model.final_logits_bias.copy_(torch.randn(1, 40, generator=GENERATOR()))
    if name == "mlm":
        nn.init.normal_(model.lm_head.bias, generator=GENERATOR())
    before = copy.deepcopy(model.state_dict())
    small = X.trim_model(model, KEEP)
    ids = KEEP[torch.randint(1, 12, (3, 7), generator=GENERATOR())]
    with torch.no_grad():
        old, new = scores(name, model, ids)[..., KEEP], scores(name, small, X.vocabulary_map(KEEP, 40)[ids])
    assert torch.allclose(old, new, atol=1e-6) and new.shape == (3, 7, 12)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in small.parameters()}


@pytest.mark.parametrize("name, removed", [("decoder", 28 * 16), ("forty positions", 28 * 16), ("forty wide", 28 * 40), ("moe", 28 * 16), ("mlm", 28 * 17), ("mbart", 28 * 16),
                                           ("t5", 28 * 16), ("gru", 28 * (4 + 9))])
def test_ties_survive_and_exactly_the_removed_rows_go(name, removed):
    model = MODELS[name]()
    small = X.trim_model(model, KEEP)
    assert M.parameter_count(model).total - M.parameter_count(small).total == removed
    if name != "gru":
        assert small.get_output_embeddings().weight is small.get_input_embeddings().weight and small.config.vocab_size == 12
        assert small.get_input_embeddings().num_embeddings == small.get_output_embeddings().out_features == 12


def test_special_ids_move_along_and_the_model_can_be_saved(tmp_path):
    model = M.encoder_decoder(40, width=16, heads=2, layers=1, max_length=8, pad_id=5, bos_id=20, eos_id=30, seed=0).eval()
    keep = torch.tensor([5, 7, 20, 30])
    small = X.trim_model(model, keep).eval()
    assert (small.config.pad_token_id, small.config.bos_token_id, small.config.eos_token_id, small.config.decoder_start_token_id) == (0, 2, 3, 2)
    assert (small.generation_config.pad_token_id, small.generation_config.eos_token_id) == (0, 3)
    assert small.get_input_embeddings().padding_idx == 0
    assert (model.config.pad_token_id, model.config.vocab_size, model.get_input_embeddings().padding_idx) == (5, 40, 5)
    small.save_pretrained(tmp_path)
    again, ids = M.pretrained(str(tmp_path), task="seq2seq"), torch.tensor([[1, 2, 3]])
    assert torch.allclose(again(ids, decoder_input_ids=ids).logits, small(ids, decoder_input_ids=ids).logits, atol=1e-6)
    with pytest.raises(ValueError, match="keep_ids must hold bos_token_id 20, which the model's configuration needs"):
        X.trim_model(model, torch.tensor([5, 7, 30]))


def test_a_body_inside_a_module_is_trimmed_and_its_other_layers_are_not():
    model = Tagger().eval()
    small = X.trim_model(model, KEEP)
    ids = KEEP[5:10][None]
    assert torch.equal(model(ids), small(X.vocabulary_map(KEEP, 40)[ids])) and small.head.out_features == 40
    assert small.body.config.vocab_size == 12


def test_trimmed_models_train_and_keep_what_was_frozen():
    model = M.encoder(40, width=16, heads=2, seed=0)
    model.get_input_embeddings().weight.requires_grad_(False)
    small = X.trim_model(model, KEEP)
    assert not small.get_input_embeddings().weight.requires_grad and small.lm_head.bias.requires_grad
    small(torch.arange(5)[None]).logits.sum().backward()
    assert small.lm_head.dense.weight.grad is not None and model.lm_head.dense.weight.grad is None


def test_the_loss_on_covered_text_cannot_rise():
    model = MODELS["mlm"]().eval()
    small, ids = X.trim_model(model, KEEP), KEEP[torch.randint(1, 12, (4, 7), generator=GENERATOR())]
    new = X.vocabulary_map(KEEP, 40)[ids]
    with torch.no_grad():
        full, cut = model(ids).logits.log_softmax(-1), small(new).logits.log_softmax(-1)
    drop = -full[..., KEEP].logsumexp(-1)
    gain = cut.gather(-1, new[..., None]) - full.gather(-1, ids[..., None])
    assert torch.allclose(gain[..., 0], drop, atol=1e-5) and (drop > 0).all()


def test_vocabulary_map_translates_there_and_back():
    places = X.vocabulary_map(KEEP, 40, unk_id=1)
    assert torch.equal(KEEP[places[KEEP]], KEEP) and places[5] == places[1] == 1 and len(places) == 40
    assert (X.vocabulary_map(KEEP, 40) == -1).sum() == 28
    with pytest.raises(ValueError, match="unk_id must be one of keep_ids, got 5"):
        X.vocabulary_map(KEEP, 40, unk_id=5)


def test_trim_embedding_golden_and_order():
    weight = torch.arange(12.0).view(6, 2)
    assert X.trim_embedding(weight, torch.tensor([4, 0])).tolist() == [[8, 9], [0, 1]]
    assert X.trim_embedding(torch.arange(6.0), torch.tensor([5])).tolist() == [5]
    kept = X.trim_embedding(weight, torch.tensor([0]))
    kept.zero_()
    assert weight[0, 1] == 1


@pytest.mark.parametrize("keep, message", [([0, 0, 1], "must not repeat an id, got 1 repetitions"), ([0, 6], "between 0 and 5, got 0 to 6"), ([-1], "between 0 and 5, got -1 to -1"),
                                           ([], "at least one whole number"), ([0.5], "whole number"), ([True, False], "whole number")])
def test_trim_embedding_refuses(keep, message):
    with pytest.raises(ValueError) as error:
        X.trim_embedding(torch.ones(6, 2), torch.tensor(keep))
    assert message in str(error.value)


def test_trim_model_refuses_models_without_or_with_two_vocabularies():
    with pytest.raises(ValueError, match="must have one vocabulary .* got 0 in Sequential"):
        X.trim_model(M.mlp([2, 2]), KEEP)
    with pytest.raises(ValueError, match="got 2 in ModuleList"):
        X.trim_model(nn.ModuleList([MODELS["decoder"](), MODELS["mlm"]()]), KEEP)
    with pytest.raises(ValueError, match="must hold pad_token_id 0"):
        X.trim_model(MODELS["mlm"](), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="padding id 0 at its place"):
        X.trim_model(MODELS["mlm"](), torch.tensor([1, 0]))


def test_trimming_and_choosing_layers_go_together():
    teacher = M.freeze(M.encoder(40, width=16, heads=2, layers=4, seed=0))
    student = X.trim_model(M.student_from_teacher(teacher, [1, 3]), KEEP)
    other = M.student_from_teacher(X.trim_model(teacher, KEEP), [1, 3])
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), other.state_dict().values(), strict=True))
    assert M.parameter_count(student).trainable == M.parameter_count(student).total
