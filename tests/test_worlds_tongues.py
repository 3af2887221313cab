"""Languages: round trips, exact next-token probabilities, tasks against slow checkers that read tokens only, named configurations."""
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golden_hashes import check_hashes
from kdbook.worlds.chains import CHAIN_CONFIGURATIONS, Chain
from kdbook.worlds.common import fingerprint
from kdbook.worlds.tongues import (CONFIGURATIONS, NLI_LABELS, ORDERS, WORLD_VERSION, Facts, Grammar, Meanings, Tongues, clause_template, make, pack,
                                   semantic_vectors)

# ---- a slow reader: plain Python, from the word lists and the declared habits of a language only

class Reader:
    """Reads strings of one language into clauses [{slot: concept, "not": bool}], from `lexicon` and the knobs."""

    def __init__(self, tongues, lang):
        self.grammar, self.lang, self.kind_of = tongues.grammar, lang, {}
        for kind in tongues.grammar.kinds:
            for concept, words in enumerate(tongues.lexicon(lang, kind)):
                for word in words:
                    self.kind_of[word] = (kind, concept)
        self.suffix = [w[0] for w in tongues.lexicon(lang, "suffix")] if tongues._dealt("marking", lang) == "suffix" else None
        self.polarity = [w[0] for w in tongues.lexicon(lang, "polarity")] if self.grammar.negation else []
        self.order = tongues._dealt("orders", lang)

    def clauses(self, line):
        """Clauses are told apart by the first slot's kind, which every clause has exactly once (orders with the first slot first), or by full clauses."""
        found, size = [], len(self.grammar.slots)
        words = []
        for word in line.split():
            if word in self.polarity:
                words.append(("not", word == self.polarity[1]))
                continue
            for suffix in self.suffix or [""]:
                stem = word[:len(word) - len(suffix)] if suffix else word
                if word.endswith(suffix) and stem in self.kind_of:
                    kind, concept = self.kind_of[stem]
                    if not suffix or self.grammar.slots[self.suffix.index(suffix)].rstrip("0123456789") == kind:
                        words.append((self.grammar.slots[self.suffix.index(suffix)] if suffix else kind, concept))
        per_clause = size + (self.grammar.negation > 0)
        for i, (key, value) in enumerate(words):
            if i % per_clause == 0:
                found.append({})
            assert key not in found[-1]
            found[-1][key] = value
        return found


def as_dicts(tongues, meanings):
    return [[{**{s: int(v) for s, v in zip(tongues.grammar.slots, clause)}, **({"not": bool(n)} if tongues.grammar.negation else {})}
             for clause, n in zip(concept, negated)] for concept, negated in zip(meanings.concept, meanings.negated)]


@pytest.mark.parametrize("orders", ORDERS)
@pytest.mark.parametrize("marking", ["none", "suffix"])
def test_slow_reader_understands_every_order(orders, marking):
    tongues = Tongues(Grammar(negation=0.3, fan_out=3, seed=1), languages=2, orders=orders, marking=marking, synonyms=2, fillers=1, seed=1)
    meanings = tongues.sample(60, clauses=2)
    for lang in range(2):
        reader = Reader(tongues, lang)
        assert [reader.clauses(line) for line in tongues.text(meanings, lang)] == as_dicts(tongues, meanings)


# ---- round trips

worlds = st.fixed_dictionaries({
    "orders": st.sampled_from(ORDERS), "marking": st.sampled_from(["none", "suffix", "before", "after"]), "unit": st.sampled_from(["word", "morpheme", "syllable", "letter"]),
    "synonyms": st.sampled_from([1, 2]), "fillers": st.sampled_from([0, 2]), "scripts": st.sampled_from(["own", "latin"]), "cognates": st.sampled_from([0.0, 0.7]),
    "sound_changes": st.sampled_from([0, 8]), "seed": st.integers(0, 9)})


@settings(max_examples=60, deadline=None)
@given(worlds, st.sampled_from([1, 2]), st.sampled_from([1.0, 0.6]), st.sampled_from([0.0, 0.4]), st.sampled_from(["plain", "modifier", "repeated"]))
def test_parse_inverts_render(knobs, clauses, presence, negation, slots):
    names = {"plain": ("agent", "action", "patient", "place"), "modifier": ("agent", "action", "patient", "modifier"), "repeated": ("noun1", "verb1", "noun2", "verb2")}[slots]
    tongues = Tongues(Grammar(names, 5, presence=presence, negation=negation, fan_out=2, seed=knobs["seed"]), languages=3, syllables=(2, 2), **knobs)
    meanings = tongues.sample(40, clauses=clauses)
    ambiguous = (slots == "repeated" and knobs["marking"] == "none" and (knobs["orders"] == "free" or presence < 1)) or (knobs["orders"] == "free" and presence < 1 and clauses > 1)
    if ambiguous:
        with pytest.raises(ValueError):
            tongues.parse(tongues.render(meanings, 1).ids, 1)
        return
    second = tongues.parse(tongues.render(meanings, 0).ids, 0)
    assert second.same(meanings).all()
    third = tongues.parse(tongues.render(second, 2, stream="again").ids, 2)
    assert third.same(meanings).all()


def test_render_and_text_agree_and_depend_on_nothing_else():
    tongues = Tongues(Grammar(negation=0.3, presence=0.6, seed=2), synonyms=3, fillers=2, orders=("SVO", "free"), seed=2)
    meanings = tongues.sample(200, clauses=2)
    lang = np.arange(200) % 4
    mixed, lines = tongues.render(meanings, lang), tongues.text(meanings, lang)
    for one in range(4):
        whole = tongues.render(meanings, one)
        assert (mixed.ids[lang == one] == whole.ids[lang == one]).all() and mixed.ids.shape == whole.ids.shape
    for ids, line in zip(mixed.ids, lines):
        assert " ".join(tongues.tokens[i] for i in ids if i) == line
    assert (tongues.render(meanings[:50], 1).ids == tongues.render(meanings, 1).ids[:50]).all()
    assert not (tongues.render(meanings, 1, stream="other").ids == tongues.render(meanings, 1).ids).all()


def test_renderings_of_different_meanings_differ():
    tongues = Tongues(Grammar(("agent", "action", "patient"), (4, 3, 4), presence=0.5, negation=0.5), languages=2, orders="free", marking="suffix")
    every = tongues.grammar.everything()
    for lang in range(2):
        texts = {tuple(row) for stream in range(3) for row in tongues.render(every, lang, stream=str(stream)).ids.tolist()}
        back = {tuple(sorted(i for i in row if i)) for row in texts}
        assert len(back) == len(every)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 12), st.text("ptkmsnlrbdgfvzhjwcxqaeiouy .-?", max_size=30))
def test_transliteration_is_exact_for_every_letter(lang, text):
    tongues = Tongues(languages=13)
    there = tongues.transliterate(text, lang, reverse=True)
    assert tongues.transliterate(there, lang) == text and len(there) == len(text)
    assert all(a == b or a.isalpha() for a, b in zip(text, there)) and not set(there) & set("ptkaeiou")


def test_script_changes_characters_and_nothing_else():
    own = Tongues(Grammar(negation=0.3), cognates=0.6, unit="morpheme", marking="suffix", sound_changes=4, seed=3)
    latin = replace(own, scripts="latin")
    meanings = own.sample(300, clauses=2)
    for lang in range(4):
        a, b = own.render(meanings, lang), latin.render(meanings, lang)
        assert own.transliterate(own.text(meanings, lang), lang) == latin.text(meanings, lang)
        for field in ("mask", "word", "slot", "span", "pos", "tag"):
            assert (getattr(a, field) == getattr(b, field)).all()
        table = {}
        for x, y in zip(a.ids.ravel().tolist(), b.ids.ravel().tolist()):
            assert table.setdefault(x, y) == y
        assert len(set(table.values())) == len(table)
    assert (own.cognate_matrix() == latin.cognate_matrix()).all()
    characters = [set("".join(own.tokens[i] for i in own.language_ids(lang))) - {"-"} for lang in range(4)]
    assert all(not characters[a] & characters[b] for a in range(4) for b in range(a))


def test_romanised_ids():
    tongues = make("scripts_four", 1)
    meanings = tongues.sample(50)
    for lang in range(4):
        ids = tongues.render(meanings, lang, romanised=True).ids
        assert ["".join(tongues.tokens[i] for i in row if i) for row in ids] == ["".join(line.split()) for line in tongues.text(meanings, lang, romanised=True)]
    assert (tongues.render(meanings, 0, romanised=True).ids == tongues.render(meanings, 0).ids).all()
    with pytest.raises(ValueError, match="romanise=True"):
        make("free_six").render(make("free_six").sample(2), 1, romanised=True)


# ---- languages

def test_families_share_more_within_than_across():
    for seed in range(3):
        tongues = Tongues(languages=6, families=2, scripts="latin", cognates=0.8, seed=seed)
        assert tongues.family_of == (0, 1, 0, 1, 0, 1)
        roots = tongues.cognate_matrix()
        ids = [set(tongues.language_ids(lang).tolist()) for lang in range(6)]
        shared = np.array([[len(a & b) / 70 for b in ids] for a in ids])
        assert np.allclose(roots, shared)
        family = np.equal.outer(tongues.family_of, tongues.family_of)
        assert roots[family & ~np.eye(6, dtype=bool)].min() > roots[~family].max()


def test_no_shared_tokens_where_promised_and_rows_are_counted():
    for name in ("free_six", "search_pair", "attributes_six", "zipf_bag", "dictionary"):
        tongues = make(name, 2)
        ids = [tongues.language_ids(lang) for lang in range(tongues.count)]
        assert sum(map(len, ids)) == tongues.vocab_size - 1 == len(np.unique(np.concatenate(ids)))
    assert make("free_six").vocab_size == 1 + 4 * 70 and make("linked_six", languages=1).vocab_size == 71
    rows = [make("free_six", seed, cognates=0.4, scripts="latin", orders="SVO", languages=6).vocab_size for seed in range(4)]
    assert np.mean(rows) == pytest.approx(1 + 70 + 5 * 42, abs=8)


def test_one_more_language_or_a_clone_leaves_the_others():
    for name in ("free_six", "tiers_six", "entities"):
        small = make(name, 1, sizes=None)
        large = replace(small, languages=small.languages + 1)
        meanings = small.sample(40)
        for lang in range(small.count):
            a, b = small.render(meanings, lang).ids, large.render(meanings, lang).ids
            width = min(a.shape[1], b.shape[1])
            assert (a[:, :width] == b[:, :width]).all() and not a[:, width:].any() and not b[:, width:].any()
        assert large.tokens[:small.vocab_size] == small.tokens


def test_switching_a_knob_leaves_the_words():
    plain = Tongues(Grammar(seed=5), seed=5)
    for changed in (Tongues(Grammar(seed=5, negation=0.4), seed=5), replace(plain, fillers=2), replace(plain, questions=True), replace(plain, marking="suffix"),
                    replace(plain, marking="before"), replace(plain, orders="free"), replace(plain, unit="letter"), replace(plain, scripts="latin")):
        for lang in range(4):
            assert changed.lexicon(lang, romanised=True) == plain.lexicon(lang, romanised=True)
    both = replace(plain, synonyms=2).lexicon(2, romanised=True)
    assert sum(a[0] == b[0] for a, b in zip(both, plain.lexicon(2, romanised=True))) >= 60


def test_clone():
    tongues = make("linked_six", 3)
    twice = tongues.clone(0).clone(4)
    assert twice.count == 6 and twice.tokens[:tongues.vocab_size] == tongues.tokens and twice.vocab_size == tongues.vocab_size + 140
    meanings = tongues.sample(100, clauses=4)
    a, b, c = tongues.render(meanings, 0), twice.render(meanings, 4), twice.render(meanings, 5)
    assert not np.intersect1d(a.ids, b.ids).size and not np.intersect1d(b.ids, c.ids).size
    assert len(set(zip(a.ids.ravel(), b.ids.ravel(), c.ids.ravel()))) == len(np.unique(a.ids))
    assert np.allclose(twice.logprob(meanings), tongues.logprob(meanings)) and twice.parse(b.ids, 4).same(meanings).all()
    p, q = tongues.next_logprobs(a.ids[:20], 0), twice.next_logprobs(b.ids[:20], 4)
    to = dict(zip(a.ids.ravel().tolist(), b.ids.ravel().tolist()))
    assert np.allclose(np.exp(p[..., sorted(to)]), np.exp(q[..., [to[i] for i in sorted(to)]]))
    assert twice.text(meanings, 5, romanised=True) == tongues.text(meanings, 0, romanised=True)
    assert (twice.cognate_matrix()[0, [4, 5]] == 1).all() and tongues.clone(0).family_of == (0,) * 5


# ---- structure of texts

def test_habits_hold_in_every_sentence():
    tongues = make("entities", 4)
    text, meanings = tongues.render(tongues.sample(800), np.arange(800) % 2), tongues.sample(800)
    pos, marker = np.array(tongues.pos_names), [w[0] for w in tongues.lexicon(0, "marker")]
    other = [w[0] for w in tongues.lexicon(1, "marker")]
    crossed = total = 0
    names = [{w[0]: kind for kind in tongues.grammar.kinds for w in tongues.lexicon(lang, kind)} for lang in range(2)]
    for i in range(800):
        words = [tongues.tokens[t] for t in text.ids[i]]
        assert len(words) == 12 and text.mask[i].all()
        for j in range(12):
            if text.slot[i, j] >= 0:
                slot, lang = text.slot[i, j], i % 2
                assert words[j - 1] == marker[slot] if lang == 0 else words[j + 1] == other[slot]
                assert text.tag[i, j] == slot + 1 and pos[text.pos[i, j]] == tongues.grammar.slots[slot]
                crossed += names[lang][words[j]] != tongues.grammar.slots[slot]
                total += 1
            else:
                assert text.tag[i, j] == 0 and pos[text.pos[i, j]] in ("marker", "filler")
        assert sorted(set(text.slot[i].tolist()) - {-1}) == [s for s in range(3) if meanings.concept[i, 0, s] >= 0]
    assert crossed / total == pytest.approx(0.15, abs=0.03)
    places = np.argwhere(text.slot[::2] == 0)[:, 1]  # free order: the position does not give the person away
    assert np.bincount(places, minlength=12)[1:].min() > 10


def test_words_spans_and_suffixes():
    tongues = Tongues(Grammar(seed=6), languages=3, unit="syllable", marking="suffix", syllables=(2, 2), scripts="latin", seed=6)
    meanings = tongues.sample(50, clauses=2)
    suffix = [[w[0] for w in tongues.lexicon(lang, "suffix")] for lang in range(3)]
    for lang in range(3):
        text = tongues.render(meanings, lang)
        template = clause_template(tongues.grammar, ("SVO", "SOV", "VSO")[lang])
        assert text.ids.shape == (50, 36) and text.mask.all()
        assert (text.word[0] == np.repeat(np.arange(12), 3)).all()
        assert (text.slot[0, ::3] == [s for _, s, _ in template] * 2).all()
        for row in range(50):
            for w in range(12):
                a, b, c = (tongues.tokens[i] for i in text.ids[row, 3 * w:3 * w + 3])
                slot = text.slot[row, 3 * w]
                assert c == suffix[lang][slot] and [a + b] == tongues.lexicon(lang, tongues.grammar.slots[slot])[meanings.concept[row, w // 6, slot]]
        together = text.span[0, ::3]
        assert len(set(together.tolist())) == 10 and together[[s == 2 for _, s, _ in template] * 2].tolist() == together[[s == 3 for _, s, _ in template] * 2].tolist()


def test_fillers_close_the_clause():
    tongues = make("clusters", 1, languages=2, scripts="own", orders=("SVO", "free"))
    text = tongues.render(tongues.sample(1000), 0)
    filler = text.pos == tongues.pos_names.index("filler")
    assert text.ids.shape == (1000, 8) and text.mask.all() and filler[:, 6:].all() and not filler[:, :6].any()
    modifier = np.argwhere(text.slot == 3)
    assert (text.slot[modifier[:, 0], modifier[:, 1] - 1] == 2).all()  # patient and modifier are one phrase
    polarity = np.argwhere(text.pos == tongues.pos_names.index("polarity"))
    assert (text.slot[polarity[:, 0], polarity[:, 1] + 1] == 1).all()  # before its verb
    words = np.bincount(text.ids[filler])
    assert (words > 0).sum() == 4 and words.max() < 1.2 * 500
    free = tongues.render(tongues.sample(3000), 1)
    where = (free.pos == tongues.pos_names.index("filler")).mean(0)
    assert np.abs(where[[0, 7]] - 2 / 6).max() < 0.04  # four phrases and two fillers in any order


def test_synonyms_are_used_evenly():
    tongues = make("synonyms", 2)
    meanings = tongues.sample(6000)
    text = tongues.render(meanings, 0)
    words = tongues.lexicon(0, "agent")
    assert all(len(set(row)) == 3 for row in words)
    first = [tongues.tokens[i] for i in text.ids[:, 0]]
    which = [words[c].index(w) for c, w in zip(meanings.concept[:, 0, 0], first)]
    assert np.abs(np.bincount(which) / 6000 - 1 / 3).max() < 0.03


def test_keywords():
    tongues = Tongues(Grammar(presence=0.5, seed=1), marking="suffix", scripts="latin", seed=1)
    meanings = tongues.sample(300)
    keys = tongues.keywords(meanings, 2, k=2)
    words = {w[0]: (tongues.grammar.kinds[k], c) for k, kind in enumerate(tongues.grammar.kinds) for c, w in enumerate(tongues.lexicon(2, kind))}
    orders = set()
    for i in range(300):
        found = [words[tongues.tokens[t]] for t in keys.ids[i] if t]
        assert len(found) == 2 == len(set(found))
        for kind, concept in found:
            assert meanings.concept[i, 0, tongues.grammar.slots.index(kind)] == concept
        orders.add(found[0][0] < found[1][0])
    assert orders == {True, False}


def test_corpus_sizes_are_nested():
    tongues = make("tiers_six", 1)
    corpora = [tongues.corpus(lang) for lang in range(6)]
    assert [len(c) for c in corpora] == [3000, 1000, 300, 300, 100, 30]
    small = make("tiers_six", 1, sizes=(500, 100, 30, 30, 10, 3)).corpus(0)
    assert (small.ids == corpora[0].ids[:500]).all()
    assert not (tongues.corpus(2).ids[:100] == tongues.render(tongues.sample(100), 2).ids).all()


# ---- exact next-token probabilities

lm = st.fixed_dictionaries({
    "orders": st.sampled_from(ORDERS[:6]), "marking": st.sampled_from(["none", "suffix", "before", "after"]), "unit": st.sampled_from(["word", "morpheme"]),
    "synonyms": st.sampled_from([1, 2]), "seed": st.integers(0, 5)})
said = st.fixed_dictionaries({"fan_out": st.sampled_from([None, 1]), "topics": st.sampled_from([1, 2]), "topic_odds": st.just(4.0), "negation": st.sampled_from([0.0, 0.3]),
                              "persistence": st.sampled_from([0.0, 0.5]), "zipf": st.sampled_from([0.0, 1.0])})


@settings(max_examples=40, deadline=None)
@given(lm, said, st.sampled_from([(1.0, 0), (1.0, 2), (0.6, 0), (0.6, 1)]), st.sampled_from([1, 2]))
def test_next_logprobs_are_a_distribution_whose_product_is_the_meaning(knobs, grammar, gaps, clauses):
    presence, fillers = gaps
    tongues = Tongues(Grammar(("agent", "action", "patient", "modifier"), (3, 2, 3, 2), focus=0.8, presence=presence, **grammar, seed=knobs["seed"]),
                      languages=2, fillers=fillers, filler_words=3, scripts="latin", **knobs)
    meanings = tongues.sample(25, clauses=clauses)
    ids = tongues.render(meanings, 1).ids
    logprobs = tongues.next_logprobs(ids, 1)
    assert logprobs.shape == (*ids.shape, tongues.vocab_size) and np.allclose(np.exp(logprobs).sum(-1), 1)
    total = np.take_along_axis(logprobs, ids[..., None], -1)[..., 0].sum(1)
    choices = (meanings.concept >= 0).sum((1, 2)) * np.log(tongues.synonyms)
    assert np.allclose(total, tongues.logprob(meanings) - choices - clauses * fillers * np.log(3))


def test_all_texts_of_a_small_language_sum_to_one():
    tongues = Tongues(Grammar(("agent", "action", "patient"), 2, fan_out=1, focus=0.8, negation=0.3, presence=0.6, persistence=0.3, seed=1), languages=1,
                      orders="VOS", marking="suffix", unit="morpheme", seed=1)
    every = tongues.grammar.everything(clauses=2)
    ids = tongues.render(every, 0).ids
    assert len(np.unique(ids, axis=0)) == len(every)
    assert np.exp(np.take_along_axis(tongues.next_logprobs(ids, 0), ids[..., None], -1)[..., 0].sum(1)).sum() == pytest.approx(1)


def test_floor_does_not_depend_on_the_order():
    tongues = make("linked_six", 1, orders=ORDERS[:6], languages=6)
    meanings = tongues.sample(150, clauses=4)
    floors = []
    for lang in range(6):
        ids = tongues.render(meanings, lang).ids
        floors.append(np.take_along_axis(tongues.next_logprobs(ids, lang), ids[..., None], -1).mean())
    assert np.allclose(floors, tongues.logprob(meanings).mean() / 24) and np.exp(-floors[0]) == pytest.approx(3.23, abs=0.15)


# ---- tasks, checked by reading tokens

def strings(tongues, ids):
    return [" ".join(tongues.tokens[i] for i in row if i) for row in ids]


def test_classification_labels_follow_from_the_words():
    tongues = Tongues(Grammar(negation=0.4, clusters=4, seed=3), languages=2, scripts="latin", seed=3)
    for lang in range(2):
        reader = Reader(tongues, lang)
        for task, slot, turns in ((tongues.sentiment(1000, lang), "modifier", 2), (tongues.topic(1000, lang), "agent", 0)):
            table = {}
            for line, label in zip(strings(tongues, task.ids), task.label.tolist()):
                clause = reader.clauses(line)[0]
                shifted = (label - clause["not"]) % 2 if turns else label
                assert table.setdefault(clause[slot], shifted) == shifted
            share = np.bincount(task.label) / 1000
            assert share.max() < (1.3 if turns == 0 else 1.15) / len(share)
    topics = make("scripts_four", 1).topic(50)
    assert set(topics.label.tolist()) <= {0, 1, 2, 3}


def test_tags_follow_from_the_words():
    tongues = Tongues(Grammar(negation=0.4, presence=0.6, seed=3), languages=2, scripts="latin", fillers=1, seed=3)
    for lang in range(2):
        kind = {w[0]: k for k in (*tongues.grammar.kinds, "polarity", "filler") for w in tongues.lexicon(lang, k)}
        for task, names in ((tongues.pos(1000, lang), tongues.pos_names), (tongues.ner(1000, lang), tongues.tag_names)):
            for ids, label in zip(task.ids.tolist(), task.label.tolist()):
                for i, l in zip(ids, label):
                    expected = kind[tongues.tokens[i]] if i else None
                    assert l == -100 if i == 0 else names[l] == (expected if expected in names else "O")
    assert tongues.tag_names == ("O", "agent", "patient", "place")


def test_inference_labels_follow_from_the_words():
    tongues = Tongues(Grammar(negation=0.5, presence=0.7, seed=4), languages=2, scripts="latin", seed=4)
    task = tongues.nli(1000, 0, 1)
    words = [{w[0]: (k, c) for k in (*tongues.grammar.kinds, "polarity") for c, w in enumerate(tongues.lexicon(lang, k))} for lang in range(2)]
    for p, h, label in zip(strings(tongues, task.ids), strings(tongues, task.pair_ids), task.label):
        p, h = {words[0][w] for w in p.split()}, {words[1][w] for w in h.split()}
        p_not, h_not = ("polarity", 1) in p, ("polarity", 1) in h
        p, h = ({x for x in side if x[0] != "polarity"} for side in (p, h))
        included = p <= h if p_not else h <= p
        assert NLI_LABELS[label] == ("neutral" if not included else "entailment" if p_not == h_not else "contradiction")
    assert np.bincount(task.label).max() < 1.3 / 3 * 1000


def test_similarity_follows_from_the_words():
    tongues = make("synonyms", 3, slots=("agent", "action", "patient", "modifier", "place"), concepts=20, fillers=3, filler_words=40)
    task = tongues.sts(1000)
    concept = {w: (k, c) for k in tongues.grammar.kinds for c, row in enumerate(tongues.lexicon(0, k)) for w in row}
    for a, b, score in zip(strings(tongues, task.ids), strings(tongues, task.pair_ids), task.label):
        a, b = ({concept[w] for w in line.split() if w in concept} for line in (a, b))
        assert score == pytest.approx(len(a & b) / 5)
    assert tongues.vocab_size == 1 + 300 + 40 and task.ids.shape == (1000, 8)


@pytest.mark.parametrize("changes", [{}, {"unit": "letter"}, {"unit": "morpheme", "marking": "suffix"}, {"unit": "syllable", "orders": "free"}])
def test_answers_follow_from_the_words(changes):
    tongues = make("qa_four", 2, **changes)
    for context, question in ((0, 0), (1, 0), (2, 3)):
        task = tongues.qa(120 if changes else 1000, context, question)
        agents = [{w[0]: c for c, w in enumerate(tongues.lexicon(lang, "agent"))} for lang in range(4)]
        kinds = {w[0]: k for k in tongues.grammar.kinds for w in tongues.lexicon(context, k)}
        role = {w[0]: i for i, w in enumerate(tongues.lexicon(question, "role"))}
        suffix = [w[0] for w in tongues.lexicon(context, "suffix")] if "marking" in changes else []
        for i in range(len(task)):
            tokens = [tongues.tokens[t] for t in task.ids[i]]
            join = (lambda part: "".join(part).split()) if tongues.unit == "letter" else (lambda part: part)
            q, c = (join([t for t, m, k in zip(tokens, task.question_mask[i], task.mask[i]) if k and m == want]) for want in (True, False))
            if tongues.unit == "syllable":
                continue
            answer = "".join(tokens[task.start[i]:task.end[i] + 1]).strip()
            if suffix:
                c = [w for w in c if not w.startswith("-")]
                answer = answer.split("-")[0]
            asked, agent = role[q[0]], agents[question][q[1]]
            assert asked == task.slot[i] > 0 and len(c) == 12
            clauses = [c[j:j + 4] for j in (0, 4, 8)]
            told = [clause for clause in clauses if agents[context].get(next(w for w in clause if kinds[w] == "agent")) == agent]
            assert len(told) == 1 and answer == next(w for w in told[0] if kinds[w] == tongues.grammar.slots[asked])
        assert not task.question_mask[np.arange(len(task)), task.start].any() and (task.start <= task.end).all() and task.mask[np.arange(len(task)), task.end].all()


def test_questions_are_aligned_across_languages():
    tongues = make("qa_four", 3)
    tasks = [tongues.qa(30, a, b, stream="aligned") for a in range(4) for b in range(4)]
    assert all((t.slot == tasks[0].slot).all() for t in tasks)
    assert all(t.ids.shape == (30, 14) for t in tasks)
    agent = [[tongues.lexicon(b, "agent").index([tongues.tokens[i]]) for i in t.ids[:, 1]] for b, t in zip([b for _ in range(4) for b in range(4)], tasks)]
    assert all(a == agent[0] for a in agent)
    lang = np.arange(30) % 4
    assert (tongues.qa(30, lang, 3, stream="aligned").ids[lang == 1] == tongues.qa(30, 1, 3, stream="aligned").ids[lang == 1]).all()


def test_translation_and_retrieval():
    tongues = make("scripts_four", 2, unit="word")
    pairs = tongues.translation(300, 1, 2)
    assert tongues.parse(pairs.ids, 1).same(tongues.parse(pairs.pair_ids, 2)).all() and (pairs.label == np.arange(300)).all()
    found = tongues.retrieval(300, 1, k=2)
    documents = tongues.parse(found.pair_ids, 1)
    assert len(np.unique(documents.key(), axis=0)) == 300
    words = {w[0]: (s, c) for s, kind in enumerate(tongues.grammar.kinds) for c, w in enumerate(tongues.lexicon(1, kind))}
    for ids, document in zip(found.ids, documents.concept[:, 0]):
        assert all(document[s] == c for s, c in (words[tongues.tokens[i]] for i in ids if i))


def test_splits_of_tasks_do_not_overlap():
    tongues = Tongues(Grammar(("agent", "action", "modifier"), 10, negation=0.5), languages=2, scripts="latin")
    for task in ("pos", "ner", "sentiment", "topic"):
        texts = [set(strings(tongues, getattr(tongues, task)(400, split=split).ids)) for split in ("train", "valid", "test")]
        assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_noise_has_the_stated_rate_and_is_nested():
    tongues = make("free_six")
    lang = np.arange(3000) % 4
    clean = tongues.topic(3000, lang)
    changed = [tongues.noisy(clean, lang, rate) for rate in (0.0, 0.1, 0.4, 1.0)]
    where = [c.ids != clean.ids for c in changed]
    assert not where[0].any() and all((a <= b).all() for a, b in zip(where, where[1:])) and (changed[1].ids[where[1]] == changed[3].ids[where[1]]).all()
    assert where[2].mean() == pytest.approx(0.4 * 69 / 70, abs=0.01) and (changed[2].label == clean.label).all()
    for one in range(4):
        assert set(np.unique(changed[3].ids[lang == one])) == set(tongues.language_ids(one))
    padded = Tongues(Grammar(presence=0.3)).topic(100)
    assert (Tongues(Grammar(presence=0.3)).noisy(padded, rate=1.0).ids[~padded.mask] == 0).all()
    few, which = tongues.redraw_labels(clean.label, 0.2, 4)
    many, more = tongues.redraw_labels(clean.label, 0.5, 4)
    assert (which <= more).all() and (few[which] == many[which]).all() and (few[~which] == clean.label[~which]).all() and more.mean() == pytest.approx(0.5, abs=0.03)
    assert np.bincount(many[more]).min() > 0.2 * more.sum()
    for call, message in ((lambda: tongues.noisy(clean, lang, 2), "rate must lie in"), (lambda: tongues.redraw_labels([5], 0.1, 4), "labels must lie in"),
                          (lambda: tongues.redraw_labels([0], -1, 4), "rate must lie in")):
        with pytest.raises(ValueError, match=message):
            call()


# ---- vectors, records

def test_semantic_vectors():
    tongues = make("linked_six", 2, unit="morpheme", marking="suffix")
    groups = tongues.token_groups()
    assert groups[0] == -1 and (groups[1:] >= 0).all()
    for concept in range(16):
        ids = [tongues.tokens.index(tongues.lexicon(lang, "agent")[concept][0]) for lang in range(4)]
        assert len(set(groups[ids])) == 1
    suffixes = [groups[tongues.tokens.index("-" + tongues.lexicon(lang, "suffix")[2][0])] for lang in range(4)]
    assert len(set(suffixes)) == 1
    vectors = semantic_vectors(groups, 16, 0.5, missing=0.1, seed=1)
    gone = np.isnan(vectors).any(1)
    assert vectors.shape == (tongues.vocab_size, 16) and 0.04 < gone.mean() < 0.17 and np.isnan(vectors[gone]).all()
    few, many = (np.isnan(semantic_vectors(groups, 4, 0.5, missing=m)).any(1) for m in (0.1, 0.4))
    assert (few <= many).all()
    exact = semantic_vectors(groups, 8, 0.0)
    assert all(np.allclose(exact[groups == g], exact[groups == g][0]) for g in np.unique(groups[1:]))
    clusters = make("clusters", 1)
    by_cluster = clusters.token_groups("cluster")
    agents = [by_cluster[clusters.tokens.index(w[0])] for w in clusters.lexicon(0, "agent")]
    assert len(set(agents)) == 8 and (np.equal.outer(agents, agents) == np.equal.outer(clusters.grammar.cluster_of[0], clusters.grammar.cluster_of[0])).all()


def test_records_as_tensors_and_datasets():
    torch = pytest.importorskip("torch")
    tongues = make("qa_four")
    text, task = tongues.render(tongues.sample(5), 1), tongues.qa(4)
    assert text.torch().ids.dtype == torch.int64 and text.torch().mask.dtype == torch.bool
    assert text.dataset().column_names == ["ids", "mask", "word", "slot", "span", "pos", "tag"]
    assert task.dataset().column_names == ["ids", "mask", "question_mask", "start", "end", "slot"]
    assert tongues.pos(3).dataset().column_names == ["ids", "mask", "label"] and len(tongues.sts(3).dataset()) == 3
    assert np.array_equal(np.array(text.dataset()["ids"]), text.ids)


def test_empty_draws():
    tongues = make("clusters")
    nothing = tongues.sample(0)
    assert tongues.render(nothing, 0).ids.shape == (0, 8) and tongues.text(nothing, 0) == [] and len(tongues.sentiment(0)) == 0
    morphemes = make("search_pair", questions=True)
    assert morphemes.render(morphemes.sample(0), 1).ids.shape == (0, 10) and len(morphemes.qa(0, 1, 0)) == len(morphemes.translation(0)) == len(morphemes.retrieval(0)) == 0
    assert tongues.parse(np.zeros((0, 8), dtype=int), 0).concept.shape == (0, 1, 5) and tongues.next_logprobs(np.zeros((0, 8), dtype=int), 0).shape == (0, 8, tongues.vocab_size)


def test_pack():
    a, b = pack(np.array([[0, 1, 1], [0, 0, 0]], dtype=bool), 4, np.array([[1, 2, 3], [4, 5, 6]]), np.array([[True, True, False], [True, True, True]]), fill=(-1, False))
    assert a.tolist() == [[2, 3, -1, -1], [-1] * 4] and b.tolist() == [[True, False, False, False], [False] * 4]


# ---- named configurations

def test_configurations_are_as_the_chapters_need_them():
    clusters = make("clusters")
    assert clusters.grammar.counts == (80,) * 5 and clusters.grammar.clusters == 8 and clusters.count == 1
    assert make("clusters", concepts=96).vocab_size == 1 + 5 * 96 + 2 + 4
    facts = make("attributes_six").facts
    assert facts.truth.shape == (60, 1, 12) and make("nouns").facts.truth.shape == (40, 1, 1) and isinstance(make("facts"), Facts)
    trained = make("bistil" if "bistil" in CONFIGURATIONS else "free_six", languages=6, cognates=0.4, scripts="latin", orders="SVO")
    assert {trained._dealt("orders", lang) for lang in range(6)} == {"SVO"}
    assert make("families_eight").family_of == (0, 0, 0, 1, 1, 1, 0, 1)
    lengths = {len(w[0]) for lang in range(8) for w in make("families_eight").lexicon(lang)}
    assert lengths == {4, 5, 6, 7}
    assert len(make("dictionary").lexicon(9)) == 22 and make("dictionary", concepts=20, languages=3).vocab_size == 61
    bag = make("zipf_bag", concepts=1500, languages=5, syllables=(1, 4), unit="letter")
    assert len({w[0] for lang in range(5) for w in bag.lexicon(lang)}) == 7500
    borrowed = make("zipf_bag", languages=8, topics=6, topic_odds=7.0, borrowed=0.05)
    assert 1 + 1600 - 7 * 25 < borrowed.vocab_size < 1 + 1600 - 7 * 3
    assert [c.order for c in make("chain_domains")] == [1, 1, 2, 2] and isinstance(make("chain_40", 1, sharpness=2.0), Chain)
    translico = make("scripts_four")
    assert translico.render(translico.sample(3), 2).ids.shape == (3, 12)
    m = translico.sample(8000)
    by_topic = sum(np.log(np.where(t[:, None] == np.arange(4), 15.0, 1.0)) for t in (translico.grammar.topic_of[s][m.concept[:, 0, s]] for s in range(4)))
    weights = [np.where(translico.grammar.topic_of[s] == np.arange(4)[:, None], 15.0, 1).sum(1) for s in range(4)]
    assert ((by_topic - np.log(weights).sum(0)).argmax(1) == m.topic).mean() == pytest.approx(0.97, abs=0.02)


def world_hash(name: str) -> str:
    made = make(name, seed=0)
    if name in CHAIN_CONFIGURATIONS:
        return fingerprint(*[chain.sample(64, 12) for chain in (made if isinstance(made, list) else [made])])
    if isinstance(made, Facts):
        said = made.sample(200)
        return fingerprint(made.truth, said.ids, said.true)
    meanings = made.sample(64, clauses=2)
    texts = [made.render(meanings, lang) for lang in range(made.count)]
    extra = [made.qa(32, 1, 0).ids] if made.questions else []
    return fingerprint(meanings.key(), meanings.topic, *(t.ids for t in texts), texts[-1].tag, *extra, made.label(meanings, made.grammar.slots[:1], 2), "\n".join(made.tokens))


def test_stored_hashes():
    check_hashes("tongues", WORLD_VERSION, {name: world_hash(name) for name in (*CONFIGURATIONS, "facts", *CHAIN_CONFIGURATIONS)})


def test_two_processes_agree():
    code = ("import hashlib; from kdbook.worlds.tongues import make; w = make('scripts_four', 5); m = w.sample(99, split='train');"
            "print(hashlib.sha256(w.render(m, 2).ids.tobytes() + w.logprob(m).tobytes() + w.label(m).tobytes()).hexdigest())")
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent).stdout for _ in range(2)}
    assert len(runs) == 1 and len(runs.pop().strip()) == 64


@pytest.mark.parametrize("call, message", [
    (lambda: make("linked_sex"), "name must be one of.*nearest: linked_six"),
    (lambda: make("free_six", cognate=0.3), "free_six has no knob 'cognate' .nearest: cognates"),
    (lambda: make("facts", concept=3), "facts has no knob 'concept' .nearest: concepts"),
    (lambda: make("chain_40", vocabulary=3), "no knob 'vocabulary'"),
    (lambda: make("nouns", facts={"propertys": 2}), "facts has no knob 'propertys' .nearest: properties"),
    (lambda: Tongues(languages=0), "languages must be at least 1"),
    (lambda: Tongues(families=(0, 1)), "families must be a number >= 1 or one family for each of the 4"),
    (lambda: Tongues(sizes=(1, 2)), "sizes must be one for each of the 4"),
    (lambda: Tongues(scripts="klingon"), "scripts must be one of"),
    (lambda: Tongues(orders="SOX"), "orders must be one of.*nearest: "),
    (lambda: Tongues(marking=("none", "sufix")), "marking must be one of.*nearest: 'suffix'|marking must be one of.*suffix"),
    (lambda: Tongues(unit="byte"), "unit must be one of"),
    (lambda: Tongues(synonyms=0), "synonyms must be at least 1"),
    (lambda: Tongues(clause_words=5), "clause_words must be at least the 6 words"),
    (lambda: Tongues(Grammar(("a", "b"), 4), crossover=0.1), "crossover must lie in .* needs two entity kinds"),
    (lambda: Tongues(cognates=2.0).vocab_size, "cognates must lie in"),
    (lambda: Tongues(sound_changes=1).vocab_size, "sound_changes must be 0 or"),
    (lambda: Tongues().render(Tongues().sample(2), 4), "lang must be a language from 0 to 3, got 4"),
    (lambda: Tongues().render(Tongues().sample(2), [0, 1, 2]), "lang must be one language or 2 of them"),
    (lambda: Tongues().render(Meanings(np.zeros((2, 1, 3), int), np.zeros((2, 1), bool), np.zeros(2, int)), 0), "meanings must have 6 slots"),
    (lambda: Tongues().parse(Tongues().render(Tongues().sample(2), 1).ids, 0), "ids must be texts of language 0; row 0"),
    (lambda: Tongues().parse([[999]], 0), "ids must lie in"),
    (lambda: Tongues().parse([1, 2], 0), r"ids must be integers of shape \(N, T\)"),
    (lambda: Tongues(unit="syllable").parse([[1, 2]], 0), "parse needs stems of one number of syllables"),
    (lambda: make("entities").parse([[1, 2]], 0), "parse needs crossover 0"),
    (lambda: make("tiers_six").next_logprobs([[1, 2]], 0), "next_logprobs needs unit word or morpheme"),
    (lambda: Tongues(orders="free").next_logprobs([[1, 2]], 0), "next_logprobs needs .* a fixed order"),
    (lambda: make("entities", orders="SVO", crossover=0.0).next_logprobs([[1, 2]], 0), "no clause_words beside optional slots"),
    (lambda: Tongues(clause_words=9, fillers=1), "without fillers beside it"),
    (lambda: Tongues().lexicon(0, "nouns"), "kind must be one of"),
    (lambda: Tongues().lexicon(0, "role"), "kind 'role' has no words in this world"),
    (lambda: Tongues().qa(3), "qa needs questions=True"),
    (lambda: Tongues().nli(3), "nli needs negation"),
    (lambda: make("zipf_bag").ner(3), "ner needs a slot of one of the kinds"),
    (lambda: Tongues().corpus(0), "sizes must be given"),
    (lambda: Tongues().keywords(Tongues().sample(2), 0, k=0), "k must be at least 1"),
    (lambda: make("tiers_six").token_groups(), "token_groups needs unit word or morpheme"),
    (lambda: make("dictionary").retrieval(30), "n must be at most the 22 different meanings"),
    (lambda: Tongues().clone(7), "lang must be a language"),
    (lambda: semantic_vectors([0, 1], 0, 0.1), "dim must be >= 1"),
    (lambda: Tongues(Grammar(concepts=60), syllables=(1, 1)).vocab_size, "too few different words"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tokenizer():
    text = pytest.importorskip("kdbook.text")
    if not hasattr(text, "train_tokenizer"):
        pytest.skip("kdbook.text has no train_tokenizer yet")
    tongues = make("free_six")
    tokenizer = tongues.tokenizer("word", texts=200)
    line = tongues.text(tongues.sample(1), 2)[0]
    encoded = tokenizer.encode(line)
    ids = getattr(encoded, "ids", encoded)
    assert len(ids) >= 6
