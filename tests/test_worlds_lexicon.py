"""Words of related languages: unique roots, measured cognates, regular laws, scripts."""
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbook.worlds.lexicon import (LATIN, PAD, SCRIPTS, Lexicon, apply_law, draw_roots, draw_suffixes, edit_distance, letter_code, letter_swaps, script, sound_law,
                                   spell)

NOUNS = (("noun", 300), ("verb", 100))


def slow_edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        new = [i + 1]
        for j, y in enumerate(b):
            new.append(min(new[j] + 1, row[j + 1] + 1, row[j] + (x != y)))
        row = new
    return row[-1]


def test_scripts_share_no_character():
    everything = "".join(SCRIPTS.values()) + "".join(script(k) for k in range(12, 20))
    assert len(set(everything)) == len(everything) and " " not in everything and "-" not in everything
    assert all(len(script(name)) == 26 for name in SCRIPTS) and script(0) == SCRIPTS["greek"]
    assert all(character.isalpha() for character in everything)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 300), st.sampled_from([(1, 2), (2, 2), (2, 3), (1, 4)]), st.booleans(), st.integers(0, 99))
def test_roots_are_new_and_well_formed(n, syllables, ending, seed):
    taken = letter_code(draw_roots(50, np.zeros(0, dtype=np.int64), np.random.default_rng(seed), syllables=syllables, ending=ending))
    roots = draw_roots(n, taken, np.random.default_rng(seed), syllables=syllables, ending=ending)
    words = spell(roots)
    assert len(set(words)) == n and not np.isin(letter_code(roots), taken).any()
    for word in words[:50]:
        stem = word[:-1] if len(word) % 2 else word
        assert syllables[0] <= len(stem) // 2 <= syllables[1] and (ending or len(word) % 2 == 0)
        assert all(c in LATIN[:15] for c in stem[::2]) and all(c in "aeiou" for c in stem[1::2])


def test_suffixes():
    short = spell(draw_suffixes(75, np.zeros(0, dtype=np.int64), np.random.default_rng(0)))
    assert len(set(short)) == 75 and all(s[0] in "aeiou" and s[1] in LATIN[:15] for s in short)
    assert len(set(spell(draw_suffixes(200, np.zeros(0, dtype=np.int64), np.random.default_rng(0))))) == 200


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0, *range(2, 21)]), st.integers(0, 7), st.integers(0, 99))
def test_laws_are_permutations_that_move_what_they_say(changes, swaps, seed):
    law = sound_law(changes, np.random.default_rng(seed))
    assert sorted(law) == list(range(26)) and (law != np.arange(26)).sum() == changes
    assert all((i < 20) == (j < 20) for i, j in enumerate(law))
    swap = letter_swaps(swaps, np.random.default_rng(seed))
    assert (swap != np.arange(26)).sum() == 2 * swaps and (swap[swap] == np.arange(26)).all()
    words = draw_roots(20, np.zeros(0, dtype=np.int64), np.random.default_rng(seed))
    assert (apply_law(apply_law(words, law), np.argsort(law)) == words).all()


def within(measured, rate, n):
    return abs(measured - rate) <= 2.58 * math.sqrt(max(rate * (1 - rate), 1e-9) / n) * 1.25 + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_cognate_rates(seed):
    n = 2000
    lexicon = Lexicon((("noun", n),), (0, 0, 0, 1, 1, 1), cognates=0.6, kin=0.3, seed=seed)
    m = lexicon.cognate_matrix()
    for a in range(6):
        for b in range(a):
            family, firsts = lexicon.families[a] == lexicon.families[b], (a in (0, 3)) + (b in (0, 3))
            assert within(m[a, b], (1 if family else 0.3) * 0.6 ** (2 - firsts), n), (a, b)
    letters, origin = lexicon.letters, lexicon.origin
    for a in range(6):
        for b in range(a):
            spelled_alike = (letters[a] == letters[b]).all(-1)
            assert (spelled_alike == (origin[a] == origin[b])).all()  # no laws: cognates are identical, and nothing else is
    for a in range(6):
        assert len(set(spell(letters[a]))) == n


def test_borrowed_words():
    lexicon = Lexicon((("noun", 2000),), (0, 0, 0), cognates=0.0, borrowed=0.05, sound_changes=6, drift=1, seed=1)
    m = lexicon.cognate_matrix()
    assert within(m[0, 1], 0.05, 2000) and within(m[1, 2], 0.0025, 2000)
    same = lexicon.origin[0] == lexicon.origin[1]
    assert (lexicon.letters[0][same] == lexicon.letters[1][same]).all()  # taken sound by sound


def test_one_law_explains_all_cognates_of_a_family():
    lexicon = Lexicon(NOUNS, (0, 0, 1, 1), cognates=0.7, kin=0.5, sound_changes=10, drift=1, ending=True, seed=2)
    for a in range(4):
        for b in range(4):
            same = lexicon.origin[a] == lexicon.origin[b]
            law = {}
            for x, y in zip(lexicon.letters[a][same].ravel().tolist(), lexicon.letters[b][same].ravel().tolist()):
                assert law.setdefault(x, y) == y
            assert len(set(law.values())) == len(law)
            moved = sum(x != y for x, y in law.items())
            assert moved <= (4 if lexicon.families[a] == lexicon.families[b] else 20)


def test_closer_relatives_have_smaller_edit_distance():
    lexicon = Lexicon(NOUNS, (0, 0, 0, 1, 1, 1), cognates=0.7, kin=0.5, sound_changes=10, drift=1, seed=3)
    distance = np.array([[edit_distance(a, b).mean() for b in lexicon.letters] for a in lexicon.letters])
    family = np.equal.outer(lexicon.families, lexicon.families)
    assert distance[family & ~np.eye(6, dtype=bool)].max() < distance[~family].min()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text("abck", max_size=6), st.text("abck", max_size=6)), min_size=1, max_size=8))
def test_edit_distance(pairs):
    def letters(words):
        out = np.full((len(words), 6), PAD)
        for i, word in enumerate(words):
            out[i, :len(word)] = [LATIN.index(c) for c in word]
        return out
    fast = edit_distance(letters([a for a, _ in pairs]), letters([b for _, b in pairs]))
    assert fast.tolist() == [slow_edit_distance(a, b) for a, b in pairs]


def test_sweeps_are_nested_and_languages_stay():
    rates = [Lexicon(NOUNS, (0, 0, 0), cognates=c, seed=4) for c in (0.0, 0.3, 0.6, 1.0)]
    cognate = [r.origin[0] == r.origin[1:] for r in rates]
    for small, large, a, b in zip(cognate, cognate[1:], rates, rates[1:]):
        assert (small <= large).all() and (a.letters[1:][small] == b.letters[1:][small]).all() and (a.letters[1:][~large] == b.letters[1:][~large]).all()
    assert not cognate[0].any() and cognate[-1].all()
    more = Lexicon(NOUNS, (0, 0, 0, 1, 0), cognates=0.3, seed=4)
    assert (more.letters[:3] == rates[1].letters).all()
    kin = [Lexicon(NOUNS, (0, 1), kin=k, seed=4) for k in (0.2, 0.7)]
    assert ((kin[0].origin[0] == kin[0].origin[1]) <= (kin[1].origin[0] == kin[1].origin[1])).all()
    grown = Lexicon((*NOUNS, ("filler", 40)), (0, 0, 0), cognates=0.3, seed=4)
    assert (grown.origin[:, :400] == rates[1].origin).all() and (grown.letters[0, :400] == rates[1].letters[0]).all()


@pytest.mark.parametrize("call, message", [
    (lambda: Lexicon(NOUNS, (0,), cognates=1.1), "cognates must lie in"),
    (lambda: Lexicon(NOUNS, (0,), kin=-1), "kin must lie in"),
    (lambda: Lexicon(NOUNS, (0,), syllables=(0, 2)), "syllables must be"),
    (lambda: Lexicon(NOUNS, (0,), alphabet=(21, 5)), "alphabet must be"),
    (lambda: Lexicon((("noun", 100),), (0, 0), syllables=(1, 1)).letters, "too few different words"),
    (lambda: sound_law(1, np.random.default_rng(0)), "sound_changes must be 0 or lie between 2"),
    (lambda: sound_law(21, np.random.default_rng(0)), "sound_changes must be"),
    (lambda: letter_swaps(8, np.random.default_rng(0)), "drift must lie between"),
    (lambda: Lexicon(NOUNS, (0,)).cognate_matrix(["adverb"]), "groups must name some of"),
    (lambda: script("klingon"), "script must be one of"),
    (lambda: draw_suffixes(80, np.zeros(0, int), np.random.default_rng(0), alphabet=(2, 2)), "too few different suffixes"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
