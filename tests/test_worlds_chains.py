"""Chains: exact probabilities, named random streams, relatives, named configurations."""
import hashlib
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbook.worlds.chains import WORLD_VERSION, Chain, make
from kdbook.worlds.common import stream_rng

knobs = st.fixed_dictionaries({"vocab": st.integers(2, 6), "order": st.integers(1, 3), "sharpness": st.floats(0, 3), "seed": st.integers(0, 50)})


def slow_logprob(chain, sequence):
    """Plain Python: the formula token by token, from the raw weights."""
    E = stream_rng(WORLD_VERSION, chain.seed, f"chain/E/own/{chain.index}").normal(size=(chain.vocab, 16))
    W = stream_rng(WORLD_VERSION, chain.seed, f"chain/W/own/{chain.index}").normal(size=(chain.order, 16, 128)).reshape(-1, 128) / math.sqrt(16 * chain.order)
    U = stream_rng(WORLD_VERSION, chain.seed, f"chain/U/own/{chain.index}").normal(size=(128, chain.vocab)) * 3 / math.sqrt(128)
    total = -chain.order * math.log(chain.vocab)
    for t in range(chain.order, len(sequence)):
        x = np.concatenate([E[c] for c in sequence[t - chain.order:t]])
        z = chain.sharpness * 1.6 * np.tanh(1.5 * x @ W) @ U
        z = [float(v) for v in z]
        top = max(z)
        total += z[sequence[t]] - top - math.log(sum(math.exp(v - top) for v in z))
    return total


@settings(max_examples=25, deadline=None)
@given(knobs, st.integers(0, 2))
def test_probabilities_sum_to_one_and_follow_the_formula(k, more):
    chain = Chain(**k)
    length = chain.order + min(more, 1 if chain.vocab > 4 else 2)
    everything = np.array(list(product(range(chain.vocab), repeat=length)))
    logprob = chain.logprob(everything)
    assert np.exp(logprob).sum() == pytest.approx(1, abs=1e-10)
    for i in np.linspace(0, len(everything) - 1, 7).astype(int):
        assert logprob[i] == pytest.approx(slow_logprob(chain, everything[i]), abs=1e-9)


def test_samples_follow_the_probabilities():
    for chain in (Chain(vocab=4, order=2, sharpness=1.0), Chain.relatives([0, 0], vocab=4, order=1, sharpness=1.5)[1]):
        drawn = chain.sample(100_000, 4)
        counts = np.bincount(drawn @ 4 ** np.arange(3, -1, -1), minlength=256)
        expected = 100_000 * np.exp(chain.logprob(np.indices((4,) * 4).reshape(4, -1).T))
        often = expected > 5  # chi-square needs expected counts that are not tiny
        chi_square = ((counts - expected) ** 2 / expected)[often].sum()
        assert abs(chi_square - often.sum()) < 5 * math.sqrt(2 * often.sum()) and abs(counts[~often].sum() - expected[~often].sum()) < 60


def test_with_and_without_a_table_agree():
    big = make("chain_64", seed=1)
    assert big.table is None and make("chain_16").table is not None
    tokens = big.sample(50, 9)
    context = tokens[:, :3]
    assert np.allclose(big.logprobs(tokens)[:, 0], big.next_logprobs(context)[np.arange(50), tokens[:, 3]])
    small = Chain(vocab=8, order=3, sharpness=0.9, seed=2)
    without = Chain(vocab=8, order=3, sharpness=0.9, seed=2)
    without.__dict__["table"] = None
    assert np.array_equal(small.sample(300, 12), without.sample(300, 12))
    assert np.allclose(small.logprobs(small.sample(30, 12)), without.logprobs(small.sample(30, 12)))
    assert small.entropy() == pytest.approx(without.entropy())


def test_entropy_against_samples():
    for name in ("chain_16", "chain_40"):
        chain = make(name, seed=3)
        measured = -chain.logprobs(chain.sample(10_000, 13))
        assert chain.entropy(13) == pytest.approx(measured.mean(), abs=4 * measured.mean(1).std() / 100)
    chain = Chain(vocab=6, order=2, sharpness=1.0)
    long = -chain.logprobs(chain.sample(500, 400))[:, 50:]
    assert chain.entropy() == pytest.approx(long.mean(), abs=0.02)
    assert chain.entropy(3) == pytest.approx(-(np.exp(chain.table) * chain.table).sum(-1).mean())


def test_entropies_of_the_configurations():
    """The values that the chapters rely on: V 40 at 0.5, 1, 2 and V 16 at 0.5, mean over contexts and seeds."""
    for sharpness, nats in ((0.5, 2.49), (1.0, 1.30), (2.0, 0.58)):
        assert np.mean([make("chain_40", s, sharpness=sharpness).entropy(3) for s in range(10)]) == pytest.approx(nats, abs=0.08)
    assert np.mean([make("chain_16", s).entropy(4) for s in range(10)]) == pytest.approx(1.80, abs=0.08)
    easy_and_hard = np.mean([[c.entropy(24) for c in make("chain_domains", s)] for s in range(3)], 0)
    assert max(easy_and_hard[:2]) < min(easy_and_hard[2:]) - 0.2


@settings(max_examples=15, deadline=None)
@given(st.floats(0.05, 1.3), st.integers(0, 20))
def test_with_entropy(nats, seed):
    assert Chain(vocab=8, order=1, seed=seed).with_entropy(nats, length=4).entropy(4) == pytest.approx(nats, abs=1e-3)


def test_draws_are_nested_and_streams_differ():
    chain = make("chain_16", seed=4)
    assert np.array_equal(chain.sample(300, 11)[:40], chain.sample(40, 11))
    assert not np.array_equal(chain.sample(40, 11), chain.sample(40, 11, stream="valid"))
    prompts = chain.sample(5, 3, stream="prompts")
    texts = chain.sample(10, 11, prompt=np.repeat(prompts, 2, 0))
    assert np.array_equal(texts[:, :3], np.repeat(prompts, 2, 0)) and not np.array_equal(texts[0], texts[1])
    assert np.array_equal(chain.sample(4, 6, prompt=[7])[:, 0], [7] * 4)


def test_relatives():
    languages = Chain.relatives([0, 0, 1, 1], kinship=0.6, vocab=40, order=1, sharpness=0.5, seed=5)
    logits = np.stack([c.next_logits(c.contexts()).ravel() for c in languages])
    correlation = np.corrcoef(logits)
    assert 0.4 < correlation[0, 1] < 0.8 and 0.4 < correlation[2, 3] < 0.8 and np.abs(correlation[:2, 2:]).max() < 0.25
    one_more = Chain.relatives([0, 0, 1, 1, 1], kinship=0.6, vocab=40, order=1, sharpness=0.5, seed=5)
    assert one_more[:4] == languages and np.array_equal(one_more[3].table, languages[3].table)
    twins = Chain.relatives([0, 0], kinship=1.0, vocab=10, order=1)
    assert np.array_equal(twins[0].table, twins[1].table)
    assert not np.array_equal(twins[0].sample(20, 5), twins[1].sample(20, 5))


def test_teacher_is_the_same_network():
    torch = pytest.importorskip("torch")
    chain = Chain.relatives([0, 0], vocab=12, order=2, sharpness=1.0)[1]
    teacher = chain.teacher()
    ids = torch.from_numpy(chain.sample(6, 9))
    logits = teacher(ids.unfold(1, 2, 1))
    assert logits.shape == (6, 8, 12) and not list(teacher.parameters()) and logits.dtype == torch.float32
    assert np.allclose(logits.log_softmax(-1).numpy(), chain.next_logprobs(ids.unfold(1, 2, 1).numpy()), atol=1e-4)
    with pytest.raises(ValueError, match="context must have 2"):
        teacher(ids[:, :3])


def test_empty_and_dataset():
    chain = Chain(vocab=5, order=2)
    assert chain.sample(0, 7).shape == (0, 7) and chain.logprob(chain.sample(0, 7)).shape == (0,)
    assert chain.logprobs(chain.sample(3, 2)).shape == (3, 0)
    rows = chain.dataset(4, 6)
    assert rows.column_names == ["input_ids"] and np.array_equal(rows["input_ids"], chain.sample(4, 6))


@pytest.mark.parametrize("call, message", [
    (lambda: Chain(vocab=1), "vocab must be at least 2, got 1"),
    (lambda: Chain(order=0), "order must be at least 1"),
    (lambda: Chain(sharpness=-1), "sharpness must be >= 0"),
    (lambda: Chain(kinship=2, family=0), "kinship must lie in"),
    (lambda: Chain(kinship=0.5), "needs a family"),
    (lambda: Chain(seed=0.5), "seed must be an integer"),
    (lambda: Chain.relatives([0, 1], sharpnes=1), "nearest: sharpness"),
    (lambda: make("chain_41"), "name must be one of .* got 'chain_41' .nearest: chain_64"),
    (lambda: make("chain_40", odrer=1), "no knob 'odrer' .nearest: order"),
    (lambda: make("chain_domains", order=(1, 2)), "equal lengths"),
    (lambda: Chain().next_logits([1, 2]), "context must have 3 tokens"),
    (lambda: Chain().next_logprobs([1, 2, 16]), r"context must hold integer ids in \[0, 16\)"),
    (lambda: Chain().logprobs([[1, 2]]), "tokens must have shape"),
    (lambda: Chain().logprobs([[0.5, 1, 2, 3]]), "integer ids"),
    (lambda: Chain().sample(3, 2), "length at least 3"),
    (lambda: Chain().sample(3, 9, prompt=np.zeros((2, 3), int)), r"prompt must have shape \(P,\) or \(3, P\)"),
    (lambda: Chain().entropy(3), "length must be above the order 3"),
    (lambda: Chain(vocab=4).with_entropy(2.0), "nats must lie between 0 and log V"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_two_processes_agree():
    code = "from kdbook.worlds.chains import make; import hashlib; print(hashlib.sha256(make('chain_16', 7).sample(99, 11).tobytes()).hexdigest())"
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent).stdout for _ in range(2)}
    assert len(runs) == 1
    assert runs.pop().strip() == hashlib.sha256(make("chain_16", 7).sample(99, 11).tobytes()).hexdigest()


def test_frozen():
    with pytest.raises(Exception):
        Chain().vocab = 3
