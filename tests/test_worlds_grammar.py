"""Meanings: exact probabilities, predictions in any order, balanced labels, inference, facts."""
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbook.worlds.common import content_split
from kdbook.worlds.grammar import EMPTY, UNKNOWN, Facts, Grammar, Meanings, deal_classes, deal_followers, entailment

SMALL = dict(slots=("agent", "action", "patient"), concepts=(3, 4, 2))
small_knobs = st.fixed_dictionaries({
    "clusters": st.sampled_from([None, 2]), "fan_out": st.sampled_from([None, 1, 2]), "focus": st.sampled_from([0.6, 1.0]), "zipf": st.sampled_from([0.0, 1.0]),
    "topics": st.sampled_from([1, 2]), "topic_odds": st.sampled_from([1.0, 5.0]), "negation": st.sampled_from([0.0, 0.3]), "presence": st.sampled_from([1.0, 0.6]),
    "persistence": st.sampled_from([0.0, 0.4]), "seed": st.integers(0, 9)})


def slow_logprob(grammar, concept, negated, topic):
    """Plain Python, one meaning with its topic, from the knobs and the hidden assignments only."""
    total = math.log(1 / grammar.topics)
    for k, clause in enumerate(concept):
        if grammar.negation:
            total += math.log(grammar.negation if negated[k] else 1 - grammar.negation)
        for s, value in enumerate(clause):
            p_filled = 1.0 if s < 2 else grammar.presence
            if value < 0:
                total += math.log(1 - p_filled)
                continue
            kind = grammar.slot_kinds[s]
            weights = []
            for c in range(grammar.counts[kind]):
                w = (c + 1) ** -grammar.zipf * (grammar.topic_odds if grammar.topic_of[kind][c] == topic else 1.0)
                parent = grammar.tree[s]
                if parent is not None and clause[parent] >= 0:
                    likely = followers(grammar, s)[grammar.cluster_of[grammar.slot_kinds[parent]][clause[parent]]]
                    children = len(likely)
                    w *= grammar.focus / sum(likely) if likely[grammar.cluster_of[kind][c]] else (1 - grammar.focus) / (children - sum(likely))
                weights.append(w)
            p = weights[value] / sum(weights)
            if s == 0 and k and grammar.persistence:
                p = grammar.persistence * (value == concept[k - 1][0]) + (1 - grammar.persistence) * p
            total += math.log(p_filled * p) if p > 0 else -math.inf
    return total


def followers(grammar, s):
    groups = grammar.cluster_of[grammar.slot_kinds[s]]
    parents = grammar.cluster_of[grammar.slot_kinds[grammar.tree[s]]].max() + 1
    fan_out = grammar.fan_out if isinstance(grammar.fan_out, int) else grammar.fan_out[s - 1]
    return deal_followers(int(parents), int(groups.max()) + 1, fan_out, grammar._stream("followers", grammar.slots[s])).tolist()


@settings(max_examples=25, deadline=None)
@given(small_knobs)
def test_probabilities_sum_to_one_and_agree_with_the_slow_formula(knobs):
    grammar = Grammar(**SMALL, **knobs)
    every = grammar.everything(clauses=2 if knobs["presence"] == 1 else 1)
    logprob = grammar.logprob(every)
    assert np.exp(logprob).sum() == pytest.approx(1, abs=1e-10)
    for i in np.random.default_rng(0).integers(len(every), size=5):
        parts = [slow_logprob(grammar, every.concept[i].tolist(), every.negated[i].tolist(), t) for t in range(grammar.topics)]
        slow = sum(math.exp(p) for p in parts)
        assert math.exp(logprob[i]) == pytest.approx(slow, rel=1e-9, abs=1e-15)


@settings(max_examples=25, deadline=None)
@given(small_knobs, st.randoms())
def test_predictions_agree_with_enumeration(knobs, random):
    grammar = Grammar(**SMALL, **knobs)
    every = grammar.everything(clauses=2 if knobs["presence"] == 1 and not knobs["negation"] else 1)
    weight = np.exp(grammar.logprob(every))
    clauses = every.concept.shape[1]
    clause, slot = random.randrange(clauses), random.randrange(3)
    known = np.full((1, clauses, 3), UNKNOWN)
    chosen = every.concept[random.choice(np.flatnonzero((weight > 0) & (every.concept[:, clause, slot] >= 0)).tolist())]
    for k, s in product(range(clauses), range(3)):
        if (k, s) != (clause, slot) and random.random() < 0.5:
            known[0, k, s] = chosen[k, s]
    fits = ((known == UNKNOWN) | (known == every.concept)).all((1, 2)) & (every.concept[:, clause, slot] >= 0)
    slow = np.bincount(every.concept[fits, clause, slot], weights=weight[fits], minlength=grammar.counts[slot])
    assert np.allclose(grammar.predictive(known, clause, slot)[0], slow / slow.sum(), atol=1e-12)


def test_samples_follow_the_probabilities():
    for knobs in (dict(fan_out=2, focus=0.8, zipf=1, topics=2, topic_odds=5, negation=0.3, presence=0.6), dict(clusters=2, fan_out=1, focus=0.9)):
        grammar = Grammar(**SMALL, **knobs, seed=1)
        every = grammar.everything()
        index = {tuple(k): i for i, k in enumerate(every.key().tolist())}
        counts = np.bincount([index[tuple(k)] for k in grammar.sample(40_000).key().tolist()], minlength=len(every))
        expected = 40_000 * np.exp(grammar.logprob(every))
        often = expected > 5
        assert abs(((counts - expected) ** 2 / expected)[often].sum() - often.sum()) < 5 * math.sqrt(2 * often.sum())
    grammar = Grammar(slots=("agent", "action"), concepts=3, persistence=0.5)
    agents = grammar.sample(20_000, clauses=3).concept[..., 0]
    for k in (1, 2):
        assert (agents[:, k] == agents[:, k - 1]).mean() == pytest.approx(0.5 + 0.5 / 3, abs=0.015)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.data())
def test_followers_are_dealt_evenly(parents, children, data):
    fan_out = data.draw(st.integers(1, children))
    likely = deal_followers(parents, children, fan_out, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert (likely.sum(1) == fan_out).all() and likely.sum(0).max() - likely.sum(0).min() <= 1


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.05, 1), min_size=6, max_size=60), st.integers(2, 4), st.integers(0, 9))
def test_classes_are_dealt_within_one_cell(mass, classes, seed):
    table = deal_classes(mass, classes, 0.0, np.random.default_rng(seed))
    share = np.bincount(table, weights=mass, minlength=classes)
    assert share.max() - share.min() <= max(mass) + 1e-9


def test_clusters_contract():
    """In the pre-training grammar a parent tells more than a nat about its child, marginals stay even, labels are balanced."""
    for seed in range(3):
        grammar = Grammar(("agent", "action", "patient", "modifier", "place"), 80, clusters=8, fan_out=1, focus=0.9, negation=0.5, seed=seed)
        sample = grammar.sample(20_000)
        for child, parent in enumerate(grammar.tree):
            if parent is not None:
                joint = grammar.joint((grammar.slots[parent], grammar.slots[child]))[:-1, :-1]
                assert (joint * np.log(joint / np.outer(joint.sum(1), joint.sum(0)))).sum() > 1
                assert joint.sum(0).max() < 1.1 / 8
        for slots, classes in ((("action",), 4), (("agent", "action"), 6)):
            label = grammar.label(sample, slots, classes, negation=True)
            assert np.bincount(label, minlength=classes).max() / 20_000 <= 1.3 / classes
            plain = grammar.label(sample, slots, classes)
            assert ((label - plain) % classes == sample.negated[:, 0]).all()
            cell = np.stack([grammar.cluster_of[grammar.slots.index(s)][sample.concept[:, 0, grammar.slots.index(s)]] for s in slots], 1)
            table = {}
            for key, value in zip(map(tuple, cell.tolist()), plain.tolist()):
                assert table.setdefault(key, value) == value


def test_joint_agrees_with_counting():
    grammar = Grammar(fan_out=2, focus=0.7, presence=0.5, topics=3, topic_odds=4, clusters=4, seed=2)
    joint, sample = grammar.joint(("patient", "place")), grammar.sample(60_000)
    cells = [np.where(sample.concept[:, 0, s] < 0, 4, grammar.cluster_of[s][sample.concept[:, 0, s]]) for s in (2, 4)]
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(cells), 1)
    assert joint.sum() == pytest.approx(1) and np.abs(counts / 60_000 - joint).max() < 0.01


def test_floor_of_the_linked_grammar():
    by_hand = (np.log(16) - 3 * (0.625 * np.log(0.625) + 0.375 * np.log(0.025)) + 4 * (4 * np.log(3) + np.log(2))) / 24
    assert np.exp(by_hand) == pytest.approx(3.232, abs=0.001)
    for seed in range(2):
        grammar = Grammar(fan_out=(3, 3, 3, 3, 2), persistence=0.6, seed=seed)
        assert np.exp(-grammar.logprob(grammar.sample(20_000, clauses=4)).mean() / 24) == pytest.approx(3.23, abs=0.02)


def test_zipf_coverage_and_topic_posterior():
    grammar = Grammar(tuple(f"word{i}" for i in range(1, 9)), 200, zipf=1, topics=6, topic_odds=7, seed=0)
    sample = grammar.sample(10_000)
    counts = np.sort(np.bincount(sample.concept.ravel(), minlength=200))[::-1] / sample.concept.size
    for k, share in ((100, 0.88), (50, 0.76), (25, 0.63), (12, 0.51)):
        assert counts[:k].sum() == pytest.approx(share, abs=0.025)
    odds = np.where(grammar.topic_of[0] == np.arange(6)[:, None], 7.0, 1.0)
    base = 1 / np.arange(1, 201)
    by_topic = np.log(odds * base / (odds * base).sum(1, keepdims=True))
    guess = by_topic[:, sample.concept[:, 0]].sum(-1).argmax(0)
    assert (guess == sample.topic).mean() == pytest.approx(0.91, abs=0.02)


def test_nouns_tell_nothing_about_each_other():
    grammar = Grammar(("noun1", "verb1", "noun2", "noun3", "verb2", "place"), (40, 12, 8), seed=0)
    assert grammar.kinds == ("noun", "verb", "place") and grammar.slot_kinds == (0, 1, 0, 0, 1, 2)
    for a in range(6):
        known = np.full((1, 1, 6), 3)
        assert np.allclose(grammar.predictive(known, 0, a), 1 / grammar.counts[grammar.slot_kinds[a]])


# ---- draws

def test_draws_are_nested_and_independent():
    grammar = Grammar(fan_out=3, presence=0.7, negation=0.3, persistence=0.5, seed=4)
    many, few = grammar.sample(9000, clauses=2), grammar.sample(50, clauses=2)
    assert many[:50].same(few).all()
    assert not grammar.sample(50, clauses=2, stream="other").same(few).all()
    calm = replace(grammar, negation=0.0, presence=1.0).sample(50, clauses=2)
    filled = few.concept >= 0
    assert (calm.concept[..., :2] == few.concept[..., :2]).all() and not calm.negated.any() and (calm.concept[..., 3:][filled[..., 3:] & filled[..., 2:3]] >= 0).all()
    longer = Grammar((*grammar.slots[:4],), (16, 16, 16, 8), fan_out=3, seed=4).sample(50)
    assert (longer.concept == Grammar((*grammar.slots[:5],), (16, 16, 16, 8, 8), fan_out=3, seed=4).sample(50).concept[..., :4]).all()


def test_splits_are_disjoint():
    grammar = Grammar(slots=("agent", "action"), concepts=20, negation=0.5)
    parts = {split: grammar.sample(20_000, split=split) for split in ("train", "valid", "test")}
    keys = {split: set(map(tuple, part.key().tolist())) for split, part in parts.items()}
    assert not keys["train"] & keys["valid"] and not keys["train"] & keys["test"] and not keys["valid"] & keys["test"]
    assert sum(map(len, keys.values())) == 800  # all meanings, each in one part
    assert (content_split(parts["valid"].key()) == 1).all()
    assert grammar.sample(2000, split="test")[:10].same(grammar.sample(10, split="test")).all()


def test_distinct_first_slot():
    grammar = Grammar(slots=("agent", "action"), concepts=(5, 3), zipf=1, seed=1)
    agents = grammar.sample(20_000, clauses=3, distinct="agent").concept[..., 0]
    assert all(len(set(row)) == 3 for row in agents[:500].tolist())
    base = 1 / np.arange(1, 6)
    base /= base.sum()
    assert np.abs(np.bincount(agents[:, 0], minlength=5) / 20_000 - base).max() < 0.015
    second = np.bincount(agents[agents[:, 0] == 4, 1], minlength=5) / (agents[:, 0] == 4).sum()
    assert np.abs(second - np.append(base[:4] / base[:4].sum(), 0)).max() < 0.04


def test_pairs_and_similarity():
    grammar = Grammar(("agent", "action", "patient", "modifier", "place"), 20, clusters=5, seed=3)
    for level in ("concept", "cluster"):
        first, second, gold = grammar.pairs(3000, level=level)
        for i in range(300):
            a, b = first.concept[i, 0].tolist(), second.concept[i, 0].tolist()
            if level == "cluster":
                a, b = ([int(grammar.cluster_of[s][v]) for s, v in enumerate(x)] for x in (a, b))
            assert gold[i] == pytest.approx(sum(x == y for x, y in zip(a, b)) / 5)
        assert np.bincount((gold * 5).round().astype(int), minlength=6).min() > 100
    _, _, gold = grammar.pairs(500, shared=5)
    assert (gold == 1).all()
    first, second, gold = grammar.pairs(2000, shared=5, level="cluster")
    assert (gold == 1).all() and (first.concept == second.concept).mean() == pytest.approx(0.25, abs=0.02)
    assert not grammar.pairs(5, stream="a")[0].same(grammar.pairs(5, stream="b")[0]).all()


def test_corrupt():
    grammar = Grammar(("agent", "action", "patient", "place"), 12, seed=0)
    meanings = grammar.sample(20_000)
    weak = grammar.corrupt(meanings)
    kept = 0.55 + 0.45 / 12
    assert (weak.concept == meanings.concept).mean() == pytest.approx(kept, abs=0.01)
    one, two = grammar.corrupt(meanings, stream="a"), grammar.corrupt(meanings, stream="b")
    assert one.same(two).mean() == pytest.approx((0.55 ** 2 + (1 - 0.55 ** 2) / 12) ** 4, abs=0.005)  # raw pairs of the weak teacher
    assert grammar.corrupt(meanings, keep=1.0).same(meanings).all()


# ---- inference

def slow_entailment(p, p_not, h, h_not):
    premise, hypothesis = ({(s, v) for s, v in enumerate(x) if v >= 0} for x in (p, h))
    if not p_not:
        if hypothesis <= premise:
            return "contradiction" if h_not else "entailment"
    elif premise <= hypothesis:
        return "entailment" if h_not else "contradiction"
    return "neutral"


def test_inference_labels():
    grammar = Grammar(negation=0.5, presence=0.7, seed=2)
    premise, hypothesis, label = grammar.nli(3000)
    for i in range(1000):
        slow = slow_entailment(premise.concept[i, 0], premise.negated[i, 0], hypothesis.concept[i, 0], hypothesis.negated[i, 0])
        assert ("entailment", "neutral", "contradiction")[label[i]] == slow
    assert np.abs(np.bincount(label) / 3000 - 1 / 3).max() < 0.03
    assert np.array_equal(label, entailment(premise, hypothesis))
    for given in (False, True):  # the polarity of the hypothesis alone does not give the label away
        assert np.bincount(label[hypothesis.negated[:, 0] == given]).max() < 0.42 * (hypothesis.negated[:, 0] == given).sum()


def test_entailment_on_all_pairs():
    grammar = Grammar(slots=("agent", "action", "patient"), concepts=2, presence=0.5, negation=0.5)
    every = grammar.everything()
    a, b = (x.ravel() for x in np.meshgrid(np.arange(len(every)), np.arange(len(every))))
    label = entailment(every[a], every[b])
    for i, j, l in zip(a, b, label):
        assert slow_entailment(every.concept[i, 0], every.negated[i, 0], every.concept[j, 0], every.negated[j, 0]) == ("entailment", "neutral", "contradiction")[l]


# ---- facts

def test_facts():
    facts = Facts(seed=1)
    said = facts.sample(4000)
    truth = facts.truth
    for ids, true, narrative in zip(said.ids[:1000].tolist(), said.true, said.narrative):
        words = [facts.tokens[i] for i in ids]
        names = [w.rstrip("0123456789") for w in words]
        numbers = [int(w[len(n):]) for w, n in zip(words, names)]
        assert names == (["concept", "word", "word"] if narrative else ["concept", "relation", "property"])
        assert true == (not narrative and truth[numbers[0], numbers[1], numbers[2]])
    claims = said.true[~said.narrative]
    assert said.narrative.mean() == pytest.approx(0.4, abs=0.03) and claims.mean() == pytest.approx(0.4 + 0.6 * truth.mean(), abs=0.03)
    rule = np.stack([truth[facts.class_of == c].mean(0) > 0.5 for c in range(6)])[facts.class_of]
    assert (rule != truth).mean() == pytest.approx(0.02, abs=0.004) and facts.vocab_size == 125
    assert not facts.is_true([[1, 2, 3], [0, 0, 0], [124, 61, 65]]).any()
    assert facts.is_true(facts.statement(*np.argwhere(truth).T)).all() and not facts.is_true(facts.statement(*np.argwhere(~truth).T)).any()


def test_hidden_attributes_are_balanced():
    truth = Facts(concepts=60, classes=None, relations=1, properties=12, rate=0.5, exceptions=0.0, seed=3).truth
    assert (truth.sum(0) == 30).all()
    agreement = np.abs(np.corrcoef(truth[:, 0].T.astype(float)) - np.eye(12))
    assert agreement.max() < 0.5 and agreement.mean() < 0.15


def test_numbers_index_facts():
    grammar = Grammar(slots=("noun1", "verb", "noun2"), concepts=(4, 3), presence=0.5)
    meanings = grammar.sample(50)
    numbers = grammar.numbers(meanings)
    assert grammar.offsets == (0, 4)
    assert (numbers[..., 1] == meanings.concept[..., 1] + 4).all() and (numbers[..., 2] == meanings.concept[..., 2]).all()


# ---- records and errors

def test_records():
    torch = pytest.importorskip("torch")
    meanings = Grammar(negation=0.5).sample(6)
    assert meanings.torch().concept.dtype == torch.int64 and meanings.torch().negated.dtype == torch.bool
    assert meanings.dataset().column_names == ["concept", "negated", "topic"]
    assert len(meanings[[1, 3]]) == 2 and len(Grammar().sample(0)) == 0 and Grammar().logprob(Grammar().sample(0)).shape == (0,)


@pytest.mark.parametrize("call, message", [
    (lambda: Grammar(slots=()), "slots must be"),
    (lambda: Grammar(slots=("a", "a")), "slots must be"),
    (lambda: Grammar(concepts=(1, 2)), "concepts must be one number or one for each of the 6 kinds"),
    (lambda: Grammar(concepts=0), "concepts must be at least 1"),
    (lambda: Grammar(parents=(None, 2, 0, 0, 0, 0)), "parents must give each of the 6 slots"),
    (lambda: Grammar(clusters=7), "clusters must lie between 1 and the 6 concepts"),
    (lambda: Grammar(fan_out=(1, 2)), "fan_out must be one number or one for each of the 5"),
    (lambda: Grammar(fan_out=9), "fan_out must lie between 1 and the 8 groups"),
    (lambda: Grammar(focus=0.0), r"focus must lie in \(0, 1\]"),
    (lambda: Grammar(negation=1.5), "negation must lie in"),
    (lambda: Grammar(presence=-0.1), "presence must be"),
    (lambda: Grammar(presence=(1, 1)), "presence must be"),
    (lambda: Grammar(zipf=-1), "zipf must be >= 0"),
    (lambda: Grammar(persistence=0.5, presence=(0.5, 1, 1, 1, 1, 1)), "persistence needs a first slot"),
    (lambda: Grammar(seed="x"), "seed must be an integer"),
    (lambda: Grammar().sample(-1), "n must be >= 0"),
    (lambda: Grammar().sample(2, split="dev"), "split must be one of"),
    (lambda: Grammar().sample(2, distinct="agnet"), "distinct must be one of.*nearest: agent"),
    (lambda: Grammar(fan_out=2).sample(2, distinct="action"), "distinct needs a slot without a parent"),
    (lambda: Grammar(concepts=2).sample(2, clauses=3, distinct="agent"), "at least 3 concepts"),
    (lambda: Grammar().everything(), "everything.. stops at a million"),
    (lambda: Grammar().label(Grammar().sample(2), ("verb",)), "slots must be one of"),
    (lambda: Grammar().label(Grammar().sample(2), ("time",), 7), "classes must lie between 2 and the 6 cells"),
    (lambda: Grammar().logprob(Grammar(slots=("a",), concepts=2).sample(2)), "meanings must have 6 slots"),
    (lambda: Grammar().logprob(Meanings(np.full((1, 1, 6), 20), np.zeros((1, 1), bool), np.zeros(1, int))), "concepts below"),
    (lambda: Grammar().pairs(2, shared=7), "shared must lie between 0 and 6"),
    (lambda: Grammar().pairs(2, level="word"), "level must be one of"),
    (lambda: Grammar().corrupt(Grammar().sample(2), keep=2), "keep must lie in"),
    (lambda: Grammar().nli(2), "nli needs negation"),
    (lambda: entailment(Grammar().sample(2, clauses=2), Grammar().sample(2, clauses=2)), "premise and hypothesis"),
    (lambda: Grammar().sample(2).same(Grammar().sample(3)), "other must have concepts of shape"),
    (lambda: Facts(concepts=0), "concepts must be at least 1"),
    (lambda: Facts(classes=61), "classes must be None or lie between"),
    (lambda: Facts(rate=2), "rate must lie in"),
    (lambda: Facts().sample(3, true=2), "true must lie in"),
    (lambda: Facts(narrative_words=0).sample(3), "narrative must be 0"),
    (lambda: Facts(rate=0, exceptions=0).sample(3), "true must be 0 where nothing is true"),
    (lambda: Facts().is_true([1, 2, 3]), r"statements must have shape \(N, 3\)"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
