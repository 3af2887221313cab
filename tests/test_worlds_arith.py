"""The world of problems and in-context tasks, checked by slow plain-Python readers of its texts and tokens."""
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from golden_hashes import check_hashes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdbook.worlds.arith import CONFIGURATIONS, ERRORS, NAMES, PLACES, STYLES, WORLD_VERSION, LabelMaps, Problems, Sums, make
from kdbook.worlds.common import fingerprint

ROOT = Path(__file__).resolve().parent.parent


def hash_of(name, seed=0):
    world = make(name, seed)
    if isinstance(world, Sums):
        p = world.sample(400, "train")
        pairs = world.preferences(p)
        return fingerprint(world.hidden, p.values, p.kind, p.answer, world.target(p, "rationale"), world.teacher(p, "answer", 0.25), world.teacher(p, "rationale", 0.3),
                           pairs.rejected, pairs.error, p.text()[:20], world.sample(50, "test").values)
    shares = np.arange(1, world.languages + 1) / np.arange(1, world.languages + 1).sum()
    e = world.episodes(300, 5, split="train", shares=shares, mixed=0.5, flip=0.2)
    return fingerprint(world.maps, e.ids, e.task, e.clean_label, e.language, world.bank(5).ids, world.examples(100).ids, world.vectors(), world.tokens)


def test_stored_hashes():
    check_hashes("arith", WORLD_VERSION, {name: hash_of(name) for name in CONFIGURATIONS})


def test_two_processes_agree():
    code = "from test_worlds_arith import *; print([hash_of(name, 4) for name in CONFIGURATIONS])"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env={**env, "PYTHONHASHSEED": h}).stdout for h in "12"}
    assert runs == {f"{[hash_of(name, 4) for name in CONFIGURATIONS]}\n"}


# ---- sums

def read_question(text):
    """The numbers and the place of an English problem, by its words alone."""
    said = dict(re.findall(r"(\w+) has (\d+)", text))
    return [int(said[name]) for name in NAMES if name in said], re.search(r"reach the ([a-z]+(?: \d+)?)\?", text).group(1)


@pytest.mark.parametrize("name,changes", [("sums", {}), ("domains", {}), ("sums", dict(quantities=8, values=7, kinds=12, terms=3))])
@pytest.mark.parametrize("seed", [0, 9])
def test_texts_and_rationales_tell_one_hidden_set_for_each_question(name, changes, seed):
    world = make(name, seed, **changes)
    problems = world.sample(1500, "train")
    rationales, answers = world.decode(world.target(problems, "rationale")), world.decode(world.target(problems))
    fits = {}
    for text, rationale, answer, kind in zip(problems.text(), rationales, answers, problems.kind.tolist()):
        numbers, place = read_question(text)
        assert place == PLACES[kind] and len(numbers) == world.quantities
        claim, final = rationale.split(" so ")
        left, total = claim.split(" = ")
        terms = [int(t) for t in left.split(" + ")]
        assert sum(terms) == int(total) == int(final) == int(answer)
        possible = {c for c in itertools.combinations(range(len(numbers)), len(terms)) if [numbers[q] for q in c] == terms}
        fits[place] = fits.get(place, possible) & possible
    assert len(fits) == len(world.hidden) and all(len(sets) == 1 for sets in fits.values())
    assert {p: next(iter(s)) for p, s in fits.items()} == {PLACES[k]: tuple(np.flatnonzero(row)) for k, row in enumerate(world.hidden)}


def test_solve_and_inputs():
    world = Sums(seed=2)
    p = world.sample(500)
    for values, kind, answer in zip(p.values.tolist(), p.kind.tolist(), p.answer.tolist()):
        assert answer == sum(v for v, counts in zip(values, world.hidden[kind].tolist()) if counts)
    assert world.vocab_size == 16 and len(world.tokens) == 16 and world.largest == 8 and world.input_size == 13
    x = world.inputs(p, 1)
    assert x.shape == (500, 8) and x[:, :6].tolist() == p.values.tolist() and (x[:, 6] - 5).tolist() == p.kind.tolist() and set(x[:, 7].tolist()) == {12}
    assert world.inputs(p).shape == (500, 7)


def test_numbers_and_questions_are_uniform():
    p = make("sums", 3).sample(60_000)
    assert stats.chisquare(np.bincount(p.values.ravel())).pvalue > 1e-4
    assert stats.chisquare(np.bincount(p.kind)).pvalue > 1e-4
    d = make("domains", 3).sample(20_000, domain=(0.1, 0.2, 0.3, 0.4))
    assert stats.chisquare(np.bincount(d.domain), 20_000 * np.array([0.1, 0.2, 0.3, 0.4])).pvalue > 1e-4
    assert np.array_equal(d.kind // 6, d.domain)
    assert set(make("domains", 3).sample(100, "valid", domain=2).domain.tolist()) == {2}


@pytest.mark.parametrize("name", ["sums", "domains"])
def test_splits_share_no_problem_and_are_nested(name):
    world = make(name, 1)
    parts = {split: world.sample(4000, split) for split in ("train", "valid", "test")}
    contents = {split: set(map(tuple, np.column_stack([p.values, p.kind]).tolist())) for split, p in parts.items()}
    assert not contents["train"] & contents["test"] and not contents["train"] & contents["valid"] and not contents["valid"] & contents["test"]
    for split in (None, "train", "test"):
        assert np.array_equal(world.sample(123, split).values, world.sample(5000, split).values[:123])
    assert not np.array_equal(world.sample(50).values, world.sample(50, stream="other").values)
    assert len(world.sample(0)) == 0 and world.target(world.sample(0)).shape == (0, 2)


def test_more_kinds_or_domains_leave_the_others():
    assert np.array_equal(Sums(kinds=3, seed=5).hidden, Sums(kinds=9, seed=5).hidden[:3])
    assert np.array_equal(Sums(terms=(2, 3), seed=5).hidden, Sums(terms=(2, 3, 4), seed=5).hidden[:12])
    assert np.array_equal(Sums(kinds=3, seed=5).sample(99).values, Sums(kinds=9, seed=5).sample(99).values)
    assert len({tuple(row) for row in Sums(kinds=15, seed=5).hidden.tolist()}) == 15


@pytest.mark.parametrize("error", [0.0, 0.05, 0.25, 1.0])
def test_teacher(error):
    world = Sums(seed=6)
    p = world.sample(40_000)
    answer, rationale = world.teacher(p, "answer", error), world.teacher(p, "rationale", error)
    assert abs((answer[:, 0] - 7 == p.answer).mean() - (1 - error * 8 / 9)) < 0.01
    terms, total = rationale[:, [0, 2]] - 7, rationale[:, 4] - 7
    assert np.array_equal(terms.sum(1), total) and np.array_equal(total, rationale[:, 6] - 7)  # consistent even when wrong
    assert abs((total == p.answer).mean() - (1 - error * 4 / 5)) < 0.01
    assert np.array_equal(terms[:, 1], [row[np.flatnonzero(world.hidden[k])[1]] for row, k in zip(p.values, p.kind)])
    if 0 < error < 1:  # nested: what is wrong at a low rate is wrong at a higher one
        worse = world.teacher(p, "rationale", error + 0.2)
        changed = (rationale != world.target(p, "rationale")).any(1)
        assert np.array_equal(worse[changed], rationale[changed])


def slow_check(world, values, kind, ids):
    """Longest agreement with any right output, found by writing them all down."""
    names = world.tokens
    words = []
    for token in ids:
        if token in (0, 2):
            break
        words.append(names[token] if token < len(names) else "?")
    terms = [v for v, counts in zip(values, world.hidden[kind].tolist()) if counts]
    total = str(sum(terms))
    short = not {"+", "=", "so"} & set(words)
    if short:
        right = [[total]]
    else:
        right = [(" + ".join(map(str, order)) + f" = {total} so {total}").split() for order in itertools.permutations(terms)]
    agree = -1
    for candidate in right:
        same = 0
        for a, b in itertools.zip_longest(words + ["END"], candidate + ["END"]):
            if a != b:
                break
            same += 1
        agree = max(agree, same if same <= len(candidate) else 10**6)
    wrong = -1 if agree == 10**6 else agree
    if short:
        given_answer = words[0] if len(words) == 1 else None
    else:
        last = max((i for i, w in enumerate(words) if w == "so"), default=None)
        given_answer = words[last + 1] if last is not None and last + 1 < len(words) else None
    return given_answer == total, not short and (wrong == -1 or wrong > 2 * len(terms)), wrong


@given(st.sampled_from([(2,), (1, 2, 3), (4,)]), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_checker_agrees_with_the_slow_one(terms, seed):
    world, rng = Sums(values=3, terms=terms, seed=1), np.random.default_rng(seed)
    p = world.sample(60, stream=f"s{seed}")
    ids = world.target(p, "rationale")
    ids = np.concatenate([ids, np.zeros((60, 2), int)], 1)
    swap = rng.random(ids.shape) < rng.choice([0.03, 0.1, 0.5])
    ids = np.where(swap, rng.integers(0, world.vocab_size + 2, ids.shape), ids)
    short = rng.random(60) < 0.3
    ids[short, 1:] = np.where(rng.random((short.sum(), 1)) < 0.6, 2, ids[short, 1:])
    ids[short, 0] = rng.integers(6, world.vocab_size, short.sum())
    if rng.random() < 0.3:
        ids = ids[:, :rng.integers(1, ids.shape[1])]
    checked = world.check(p, ids)
    for i in range(60):
        expected = slow_check(world, p.values[i].tolist(), int(p.kind[i]), ids[i].tolist())
        got = (bool(checked.answer_ok[i]), bool(checked.rationale_ok[i]), int(checked.first_wrong_position[i]))
        assert got == expected, (world.decode(ids[i:i + 1]), ids[i], p.values[i], world.hidden[p.kind[i]])


def test_checker_accepts_targets_without_end_and_refuses_wrong_shapes():
    world = make("domains")
    p = world.sample(300)
    for style in STYLES:
        target = world.target(p, style)
        for ids in (target, np.pad(target, ((0, 0), (0, 3)), constant_values=9) if style == "answer" else target):
            checked = world.check(p, ids)
            assert checked.answer_ok.all() and (checked.first_wrong_position == -1).all() and (checked.rationale_ok == (style == "rationale")).all()
    single = Sums()
    q = single.sample(20)
    assert single.check(q, single.target(q, "rationale")[:, :7]).answer_ok.all()  # a full output whose end was cut off
    assert single.check(q[:0], np.zeros((0, 4), int)).answer_ok.shape == (0,)
    for bad in (np.zeros((3, 4), int), np.zeros(300, int)):
        with pytest.raises(ValueError, match="ids must have shape"):
            world.check(p, bad)


@pytest.mark.parametrize("name", ["sums", "domains"])
def test_preferences(name):
    world = make(name, 2)
    p = world.sample(8000)
    pairs = world.preferences(p)
    better, worse = world.check(p, pairs.chosen), world.check(p, pairs.rejected)
    assert better.answer_ok.all() and better.rationale_ok.all() and not worse.answer_ok.any()
    assert np.array_equal(worse.rationale_ok, pairs.error == ERRORS.index("answer")) and (pairs.position == worse.first_wrong_position).all() and (pairs.position >= 0).all()
    assert stats.chisquare(np.bincount(pairs.error)).pvalue > 1e-4
    for text, error in zip(world.decode(pairs.rejected), pairs.error.tolist()):
        if ERRORS[error] == "evasive":
            assert text == "?"
            continue
        claim, final = text.split(" so ")
        left, total = claim.split(" = ")
        adds_up = sum(map(int, left.split(" + "))) == int(total)
        assert adds_up == (ERRORS[error] != "arithmetic") and (final == total) == (ERRORS[error] != "answer")
    short = world.preferences(p, ("answer", "evasive"), style="answer")
    assert not world.check(p, short.rejected).answer_ok.any() and world.check(p, short.chosen).answer_ok.all()
    for errors, style in ((("quantity",), "answer"), (("typo",), "rationale"), ((), "rationale")):
        with pytest.raises(ValueError, match="errors"):
            world.preferences(p, errors, style=style)


def test_sums_errors():
    for knobs in (dict(quantities=0), dict(quantities=13), dict(values=1), dict(kinds=0), dict(kinds=16), dict(terms=7), dict(terms=()), dict(terms=(2, 0))):
        with pytest.raises(ValueError, match="quantities|values|kinds|terms"):
            Sums(**knobs)
    world = Sums()
    for call in (lambda: world.sample(5, "tset"), lambda: world.sample(5, domain=1), lambda: world.sample(5, domain=(0.5, 0.5)), lambda: world.target(world.sample(2), "rational"),
                 lambda: world.teacher(world.sample(2), "answer", 1.5), lambda: world.inputs(world.sample(2), 3), lambda: world.sample(-1)):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(ValueError, match="sums has no knob 'quantites' .nearest: quantities"):
        make("sums", quantites=3)
    with pytest.raises(ValueError, match="nearest: label_maps_80"):
        make("label_map_80")


def test_text_of_singular_and_many_places():
    p = Problems(np.array([[1, 2]]), np.array([25]), np.array([3]), np.array([0]))
    assert p.text() == ["Ana has 1 pear and Ben has 2. How many pears reach the picnic 2?"]
    table = Sums().dataset(Sums().sample(4))
    assert table["question"][0].startswith("Ana has") and table["label"][0] == table["rationale"][0].split()[-1]


# ---- label maps

def read_episode(world, line):
    """(word cluster letters, label) pairs and tag of each example, from the decoded text."""
    pieces, examples, tag = re.findall(r"<task \d+>|\S+", line), [], None
    words = []
    for piece in pieces:
        if piece.startswith("<task"):
            tag = int(piece[6:-1])
        elif piece.startswith("L"):
            examples.append((tag, words, int(piece[1:])))
            words, tag = [], None
        else:
            words.append(piece)
    return examples


@pytest.mark.parametrize("name", ["label_maps_256", "label_maps_80", "label_maps_text"])
def test_episodes_read_from_text(name):
    world = make(name, 7)
    episodes = world.episodes(1000, 6, split="train", mixed=0.5)
    maps = world.maps.tolist()
    agree = total = 0
    for line, task, clusters, languages in zip(world.decode(episodes.ids), episodes.task.tolist(), episodes.cluster.tolist(), episodes.language.tolist()):
        examples = read_episode(world, line)
        assert len(examples) == 7
        for (tag, words, label), cluster, language in zip(examples, clusters, languages):
            assert tag == (task if world.tag else None) and len(words) == world.per_example and label == maps[task][cluster]
            for word in words:
                spoken = word.split(".")
                assert (int(spoken[0]) if world.languages > 1 else 0) == language
                agree, total = agree + (spoken[-1][0] == "abcdefgh"[cluster]), total + 1
    expected = 1 - world.noise * (1 - 1 / world.clusters)
    assert abs(agree / total - expected) < 0.01 if world.noise else agree == total
    assert episodes.answer.sum(1).tolist() == [7] * 1000
    assert np.array_equal(np.sort(np.unique(episodes.ids[episodes.answer])), world.label_ids)
    assert np.array_equal(episodes.ids[episodes.answer].reshape(1000, 7) - world.label_ids[0], episodes.label)
    assert episodes.ids.max() < world.vocab_size == len(world.tokens) and episodes.ids.min() > 0


def test_the_numbers_of_the_configurations():
    mend, retrieval, text = make("label_maps_256"), make("label_maps_80"), make("label_maps_text")
    assert (mend.task_count, len(mend.task_ids("train")), len(mend.task_ids("test")), mend.vocab_size, mend.episodes(2, 8).ids.shape[1]) == (256, 200, 56, 29, 18)
    assert sorted(map(tuple, mend.maps.tolist())) == sorted(itertools.product(range(4), repeat=4))
    assert (retrieval.task_count, len(retrieval.task_ids("test")), retrieval.word_count, len(retrieval.bank(24))) == (80, 20, 72, 1920)
    assert len({tuple(m) for m in retrieval.maps.tolist()}) == 80
    assert sorted(map(tuple, text.maps.tolist())) == [(0, 1), (1, 0)] and text.episodes(3, 7).ids.shape == (3, 16) and text.vocab_size == 1 + 60 + 2


def test_unseen_tasks_and_nesting():
    world = make("label_maps_256", 5)
    train, test = world.episodes(5000, 4, split="train"), world.episodes(5000, 4, split="test")
    assert not set(train.task.tolist()) & set(test.task.tolist())
    assert not set(map(tuple, world.maps[train.task].tolist())) & set(map(tuple, world.maps[test.task].tolist()))
    assert np.array_equal(world.episodes(70, 4, split="train").ids, train.ids[:70])
    retrieval = make("label_maps_80", 5)
    assert np.array_equal(make("label_maps_80", 5, tasks=50, unseen=0).maps, retrieval.maps[:50])
    small, large = retrieval.bank(7), retrieval.bank(24)
    for task in (0, 33, 79):
        assert np.array_equal(small.ids[small.task == task], large.ids[large.task == task][:7])
        assert Counter(large.cluster[large.task == task].tolist()) == dict.fromkeys(range(6), 4)
    assert set(retrieval.examples(3000, split="test").task.tolist()) == set(range(60, 80))
    assert not set(retrieval.examples(3000, split="train").task.tolist()) & set(range(60, 80))
    big = LabelMaps(clusters=12, labels=6, tasks=2000)
    assert len(np.unique(big.maps, axis=0)) == 2000 and big.maps.max() == 5
    assert np.array_equal(LabelMaps(clusters=12, labels=6, tasks=40).maps, big.maps[:40])


def test_keep_hides_only_the_earlier_demonstrations():
    world = make("label_maps_80", 1)
    full = world.episodes(40, 5)
    for k in range(6):
        kept = full.keep(k)
        width = full.ids.shape[1] // 6
        assert np.array_equal(kept.ids[:, (5 - k) * width:], full.ids[:, (5 - k) * width:]) and (kept.ids[:, :(5 - k) * width] == 0).all()
        assert kept.answer.sum(1).tolist() == [k + 1] * 40 and kept.label.shape == (40, k + 1) and np.array_equal(kept.label[:, -1], full.label[:, -1])
        assert not kept.answer[kept.ids == 0].any()
    for bad in (-1, 6):
        with pytest.raises(ValueError, match="shots"):
            full.keep(bad)


def test_flips_and_languages():
    world = make("label_maps_text", 3)
    e = world.episodes(20_000, 7, shares=(0.6, 0.3, 0.1), mixed=0.1, flip=0.15)
    assert np.array_equal(e.label[:, -1], e.clean_label[:, -1])
    assert abs((e.label[:, :-1] != e.clean_label[:, :-1]).mean() - 0.15) < 0.005
    several = (e.language != e.language[:, :1]).any(1)
    all_equal = (np.array([0.6, 0.3, 0.1]) ** 8).sum()
    assert abs(several.mean() - 0.1 * (1 - all_equal)) < 0.01
    assert stats.chisquare(np.bincount(e.language[~several, 0])).pvalue < 1e-10 and abs((e.language == 2).mean() - 0.1) < 0.01
    crossing = world.episodes(500, 3, shares=(1, 0, 0), query_language=2)
    assert (crossing.language[:, :-1] == 0).all() and (crossing.language[:, -1] == 2).all()
    plain = world.episodes(500, 3, shares=(1, 0, 0))
    assert np.array_equal(plain.cluster, crossing.cluster) and np.array_equal(plain.ids[:, :-2], crossing.ids[:, :-2])
    four = make("label_maps_256", 3).episodes(20_000, 4, flip=0.3)
    wrong = four.label[:, :-1] != four.clean_label[:, :-1]
    shift = (four.label - four.clean_label)[:, :-1][wrong] % 4
    assert stats.chisquare(np.bincount(shift, minlength=4)[1:]).pvalue > 1e-4


@pytest.mark.parametrize("name,flip", [("label_maps_256", 0.0), ("label_maps_256", 0.25), ("label_maps_text", 0.1)])
def test_posterior_by_enumeration(name, flip):
    world = make(name, 2)
    e = world.episodes(60, 3, flip=flip)
    fast = world.posterior(e, flip=flip)
    possible = list(itertools.permutations(range(world.labels))) if world.bijective else list(itertools.product(range(world.labels), repeat=world.clusters))
    for i in range(60):
        mass = [0.0] * world.labels
        for m in possible:
            weight = 1.0
            for c, y in zip(e.cluster[i, :-1].tolist(), e.label[i, :-1].tolist()):
                weight *= 1 - flip if m[c] == y else flip / (world.labels - 1)
            mass[m[e.cluster[i, -1]]] += weight
        assert np.allclose(fast[i], np.array(mass) / sum(mass))
    many = world.episodes(20_000, 3, flip=flip, stream="many")  # calibrated: the truth has the probability that is stated
    p = world.posterior(many, flip=flip)
    truth = p[np.arange(20_000), many.clean_label[:, -1]]
    assert abs(truth.mean() - (p ** 2).sum(1).mean()) < 0.01


def test_vectors_carry_the_cluster():
    world = make("label_maps_80", 4)
    v = world.vectors()
    assert v.shape == (world.vocab_size, 32) and v.dtype == np.float32 and (v[0] == 0).all()
    words = v[1:73]
    unit = words / np.linalg.norm(words, axis=1, keepdims=True)
    cosine, cluster = unit @ unit.T, np.arange(72) // 12
    same = cluster[:, None] == cluster
    np.fill_diagonal(cosine, np.nan)
    assert np.nanmean(cosine[same]) > 0.25 and abs(np.nanmean(cosine[~same])) < 0.1
    # retrieval with a tag: the numbers of the trial, about .99 .95 .88 .73 at 1, 3, 5, 10
    bank, queries = world.bank(24), world.examples(800, split="test")
    code = [(lambda x: x / np.linalg.norm(x, axis=1, keepdims=True))(v[s.words].mean(1) + v[world.tag_ids[s.task]]) for s in (queries, bank)]
    found = np.argsort(-code[0] @ code[1].T, 1)
    hits = [(bank.task[found[:, :k]] == queries.task[:, None]).mean() for k in (1, 5, 10)]
    assert hits[0] > 0.95 and 0.8 < hits[1] < 0.97 and 0.6 < hits[2] < 0.85


def test_decode_with_other_words():
    world = make("label_maps_text")
    lists = [[f"{language}{i}" for i in range(20)] for language in ("en", "ro", "sw")]
    line = world.decode(world.episodes(1, 2, shares=(0, 1, 0)).ids, words=lists)[0].split()
    assert all(w.startswith("ro") for w in line[::2]) and all(w in ("L0", "L1") for w in line[1::2])
    with pytest.raises(ValueError, match="3 lists of 20"):
        world.decode(np.zeros((1, 3), int), words=lists[:2])


def test_label_maps_errors():
    for knobs in (dict(clusters=0), dict(noise=2), dict(bijective=True, labels=3), dict(tasks=0), dict(tasks=257), dict(unseen=256), dict(unseen=-1), dict(clusters=20, labels=10)):
        with pytest.raises(ValueError):
            LabelMaps(**knobs)
    world = make("label_maps_text")
    for call, match in ((lambda: world.episodes(3, 2, split="test"), "no unseen"), (lambda: world.episodes(3, 2, split="valid"), "split"), (lambda: world.episodes(3, 2, shares=(1, 0)), "shares"),
                        (lambda: world.episodes(3, 2, flip=-1), "flip"), (lambda: world.episodes(3, 2, mixed=2), "mixed"), (lambda: world.episodes(3, 2, query_language=3), "query_language"),
                        (lambda: world.episodes(-1, 2), "n and shots"), (lambda: LabelMaps(clusters=9).posterior(LabelMaps(clusters=9).episodes(2, 2)), "maps must be given"),
                        (lambda: world.posterior(world.episodes(2, 2), flip=1), "flip")):
        with pytest.raises(ValueError, match=match):
            call()
    assert make("label_maps_256").episodes(0, 3).ids.shape == (0, 8) and make("label_maps_256").episodes(5, 0).ids.shape == (5, 2)


def test_records_as_tensors_and_datasets():
    episodes = make("label_maps_256").episodes(6, 2)
    tensors = episodes.torch()
    assert type(tensors.keep(1).ids) is type(tensors.ids) and np.array_equal(tensors.keep(1).ids.numpy(), episodes.keep(1).ids)
    assert tuple(tensors.ids.shape) == (6, 6) and tuple(tensors.keep(1).answer.sum(1)) == (2,) * 6
    assert episodes.dataset().num_rows == 6
