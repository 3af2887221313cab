"""The world of real digits: splits, labels, shifts, junk and recipes, checked by plain Python."""
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_hashes import check_hashes
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbook.worlds.common import fingerprint
from kdbook.worlds.digits import (JUNK, RECIPES, WORLD_VERSION, Digits, Set, contrast, invert, junk, linear_mix, make, permute, redraw_labels, relabel)

ROOT = Path(__file__).resolve().parent.parent
CALLS = {
    "plain": ("plain", {}),
    "noisy_labels": ("noisy_labels", {}),
    "noisy_labels/meal_v2": ("noisy_labels", dict(train=1000, valid=0, rate=0.3, scale=(-0.3, 0.7))),
    "relabelled": ("relabelled", {}),
    "halves/krr_st": ("halves", dict(train=1200, per_class=10)),
    "halves/further_pretraining": ("halves", dict(labelled=50, inverted=0.7)),
    "domains": ("domains", {}),
    "web": ("web", {}),
}


@pytest.fixture(scope="module")
def file():
    from sklearn.datasets import load_digits
    data = load_digits()
    return [[int(v) for v in row] for row in data.data], [int(v) for v in data.target]


def hash_of(parts):
    return fingerprint(*[a for name in sorted(parts) for a in ([name], parts[name].x, parts[name].y, parts[name].digit, parts[name].index, parts[name].domain)])


def test_the_file_is_the_one_we_know():
    p = Digits().pictures
    order = np.argsort(p.index)
    pixels = (p.x[order] * 16).round().astype(np.uint8)
    assert hashlib.sha256(pixels.tobytes() + p.digit[order].astype(np.uint8).tobytes()).hexdigest() == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def test_stored_hashes():
    check_hashes("digits", WORLD_VERSION, {call: hash_of(make(name, 0, **changes)) for call, (name, changes) in CALLS.items()})


def test_two_processes_agree():
    code = "from kdbook.worlds.digits import *; from test_worlds_digits import hash_of; print([hash_of(make(n, 3)) for n in ('noisy_labels', 'relabelled', 'domains', 'web')])"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env={**env, "PYTHONHASHSEED": h}).stdout for h in "12"}
    assert runs == {f"{[hash_of(make(n, 3)) for n in ('noisy_labels', 'relabelled', 'domains', 'web')]}\n"}


@pytest.mark.parametrize("scale", [(0, 1), (-1, 1), (-0.3, 0.7)])
def test_pictures_are_those_of_the_file(file, scale):
    pixels, targets = file
    p = Digits(5, scale).pictures
    low, high = scale
    for row, digit, index in list(zip(p.x.tolist(), p.digit.tolist(), p.index.tolist()))[:300]:
        assert digit == targets[index]
        assert all(abs(v - (low + (high - low) * g / 16)) < 1e-6 for v, g in zip(row, pixels[index]))
    assert sorted(p.index.tolist()) == list(range(1797)) and p.x.dtype == np.float32 and p.y.tolist() == p.digit.tolist()


@given(st.integers(0, 10**6), st.lists(st.integers(0, 700), min_size=1, max_size=4), st.booleans())
@settings(max_examples=30, deadline=None)
def test_split_is_disjoint_in_order_and_nested(seed, sizes, rest):
    world, names = Digits(seed), "abcd"[:len(sizes)]
    wanted = dict(zip(names, sizes)) | ({"rest": None} if rest else {})
    if sum(sizes) > 1797:
        with pytest.raises(ValueError, match="at most 1797"):
            world.split(**wanted)
        return
    parts = world.split(**wanted)
    assert list(parts) == list(wanted) and [len(parts[n]) for n in names] == sizes
    taken = [i for part in parts.values() for i in part.index.tolist()]
    assert len(taken) == len(set(taken)) and taken == world.pictures.index[:len(taken)].tolist()
    assert not rest or len(taken) == 1797


def test_split_edges():
    world = Digits(1)
    parts = world.split(a=10, rest=None, b=20)
    assert [len(p) for p in parts.values()] == [10, 1767, 20] and len(world.split(a=0)["a"]) == 0 and world.split() == {}
    assert not {*parts["b"].index} & {*parts["rest"].index}
    for bad in ({"a": -1}, {"a": None, "b": None}):
        with pytest.raises(ValueError, match="sizes"):
            world.split(**bad)
    for bad in (dict(scale=(1, 0)), dict(scale=(0,)), dict(classes=(10,)), dict(classes=())):
        with pytest.raises(ValueError, match="scale|classes"):
            Digits(**bad)
    assert Digits(1).pictures.index.tolist() != Digits(2).pictures.index.tolist()


def test_classes_keep_the_order_of_the_others():
    everything, low = Digits(3).pictures, Digits(3, classes=range(5)).pictures
    assert low.index.tolist() == [i for i, d in zip(everything.index.tolist(), everything.digit.tolist()) if d < 5]
    assert low.index.tolist() == everything.only(range(5)).index.tolist() and len(low) == 901


def test_per_class_counts_and_nesting():
    world, before = Digits(2), set()
    for n in (0, 1, 5, 10, 174):  # 174 pictures of the digit 8, the fewest
        few, rest = world.per_class(n)
        counts = {d: few.digit.tolist().count(d) for d in range(10)}
        assert set(counts.values()) == {n} and len(few) + len(rest) == 1797 and not {*few.index} & {*rest.index}
        assert before <= {*few.index.tolist()}
        before = {*few.index.tolist()}
        positions = [world.pictures.index.tolist().index(i) for i in few.index.tolist()[:50]]
        assert positions == sorted(positions)
    for n in (175, -1):
        with pytest.raises(ValueError, match="n must be between 0 and 174"):
            world.per_class(n)
    empty = world.pictures[:0]
    assert [len(s) for s in empty.per_class(0)] == [0, 0]


@pytest.mark.parametrize("rate,classes", [(0.0, 10), (0.4, 10), (1.0, 10), (0.6, 3)])
def test_redraw_labels(rate, classes):
    y = np.arange(20000) % classes
    drawn, mask = redraw_labels(y, rate, classes, seed=4)
    assert all(a == b for a, b, m in zip(y.tolist(), drawn.tolist(), mask.tolist()) if not m)
    assert abs(mask.mean() - rate) < 0.02 and abs((drawn != y).mean() - rate * (classes - 1) / classes) < 0.02
    if mask.any():  # uniform over all classes, the truth included
        assert np.abs(np.bincount(drawn[mask], minlength=classes) / mask.sum() - 1 / classes).max() < 0.02
    more, larger = redraw_labels(y, min(1, rate + 0.2), classes, seed=4)
    assert (mask <= larger).all() and np.array_equal(more[mask], drawn[mask])
    shorter, _ = redraw_labels(y[:100], rate, classes, seed=4)
    assert np.array_equal(shorter, drawn[:100]) and np.array_equal(y, np.arange(20000) % classes)


def test_redraw_labels_errors():
    for y, rate, classes in (([0, 1], 1.5, 10), ([0, 1], -0.1, 10), ([0, 10], 0.5, 10), ([-1], 0.5, 10)):
        with pytest.raises(ValueError, match="rate|labels"):
            redraw_labels(y, rate, classes)
    assert redraw_labels([], 0.5)[0].shape == (0,)
    a, b = redraw_labels(np.zeros(99, int), 1.0, stream="a")[0], redraw_labels(np.zeros(99, int), 1.0, stream="b")[0]
    assert not np.array_equal(a, b)


def test_relabel():
    y = list(range(10))
    assert relabel(y, "parity").tolist() == [d % 2 for d in y]
    assert relabel(y, "below_five").tolist() == [int(d < 5) for d in y]
    assert relabel(y, "pairs").tolist() == [d // 2 for d in y]
    assert relabel(y, "halves").tolist() == [d if d < 5 else d - 5 for d in y]
    assert relabel(y, [3] * 10).tolist() == [3] * 10
    for bad in ("parities", [1, 2, 3], [0.5] * 10):
        with pytest.raises(ValueError, match="how"):
            relabel(y, bad)
    with pytest.raises(ValueError, match="y must"):
        relabel([10], "parity")


def test_shifts():
    x = Digits(0).pictures.x[:50]
    where = [int(v) for v in permute(np.arange(64)[None], 7)[0]]
    assert sorted(where) == list(range(64)) and where != list(range(64))
    assert permute(x, 7).tolist() == [[row[i] for i in where] for row in x.tolist()]
    assert permute(np.arange(64)[None], 7, "other")[0].tolist() != where
    matrix = linear_mix(np.eye(64, dtype=np.float32), 0.15, 7).T  # column j = image of pixel j
    assert np.allclose(linear_mix(x, 0.15, 7), [[sum(m * v for m, v in zip(line, row)) for line in matrix.tolist()] for row in x.tolist()], atol=1e-4)
    noise = (matrix - np.eye(64)) / 0.15 * 8
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert np.allclose(linear_mix(x, 0.3, 7) - x, 2 * (linear_mix(x, 0.15, 7) - x), atol=1e-5)
    assert np.allclose(invert(x), [[0.7 * (1 - v) for v in row] for row in x.tolist()], atol=1e-6)
    with pytest.raises(ValueError, match="x must"):
        permute(x[0])


def test_contrast():
    x = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (4000, 1))
    shifted = contrast(x, 3, noise=0.0)
    factor, brightness = shifted[:, -1] - shifted[:, 0], shifted[:, 0]
    assert factor.min() >= 0.6 - 1e-5 and factor.max() <= 1 + 1e-5 and abs(factor.mean() - 0.8) < 0.01
    assert brightness.min() >= 0 and brightness.max() <= 0.15 and abs(brightness.mean() - 0.075) < 0.005
    assert abs((contrast(x, 3) - shifted).std() - 0.1) < 0.002
    assert np.array_equal(contrast(x, 3)[:7], contrast(x[:7], 3))
    with pytest.raises(ValueError, match="factor"):
        contrast(x, factor=(1, 0))


def test_junk_is_made_as_told():
    x = Digits(0).pictures.x[:12]
    rows = [tuple(r) for r in x.tolist()]
    overlay, _ = junk(x, "overlay", 200, 1)
    valid = {tuple(np.float32([(a + b) / 2 for a, b in zip(p, q[::-1])]).tolist()) for i, p in enumerate(rows) for j, q in enumerate(rows) if i != j}
    assert all(tuple(r) in valid for r in overlay.tolist())
    turned, _ = junk(x, "turned", 48, 1)
    poses = set()
    for r in rows:
        grid = [r[8 * i:8 * i + 8] for i in range(8)]
        left = [[grid[j][7 - i] for j in range(8)] for i in range(8)]
        poses |= {tuple(v for line in flipped for v in line) for flipped in (left, left[::-1], [l[::-1] for l in left], [l[::-1] for l in left[::-1]])}
    assert {tuple(r) for r in turned.tolist()} == poses and len(poses) == 48  # every pose once before any comes twice
    assert len(junk(x, "turned", 50, 1)[0]) == 50
    blend, _ = junk(x, "blend", 3000, 1)
    assert abs(blend.mean() - 0.7 * x.mean()) < 0.01
    nearest = min(np.std(blend[0] - 0.4 * p - 0.3 * q) for p in x for q in x)
    assert 0.18 < nearest < 0.32
    shuffled, _ = junk(x, "shuffled", 20, 1)
    assert {tuple(sorted(r)) for r in shuffled.tolist()} <= {tuple(sorted(r)) for r in rows}
    assert junk(x, "noise", 50, 1)[0].min() >= 0 and abs(junk(x, "grey", 500, 1)[0].std() - 0.15) < 0.005


def test_junk_shares_and_errors():
    x = Digits(0).pictures.x[:12]
    made, kind = junk(x, {"overlay": 0.5, "turned": 0.25, "blend": 0.25}, 101, 1)
    assert made.shape == (101, 64) and made.dtype == np.float32 and np.bincount(kind).sum() == 101
    assert [JUNK[k] for k in np.unique(kind)] == ["overlay", "turned", "blend"] and abs(np.bincount(kind)[0] - 50) <= 1
    assert junk(x, "noise", 0)[0].shape == (0, 64)
    for kinds, match in (("turn", "nearest: turned"), ({"overlay": 0.5}, "sum to 1"), ({}, "sum to 1"), ({"overlay": 2, "blend": -1}, "sum to 1")):
        with pytest.raises(ValueError, match=match):
            junk(x, kinds, 5)
    with pytest.raises(ValueError, match="two pictures"):
        junk(x[:1], "overlay", 5)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("seed", [0, 11])
def test_no_test_picture_elsewhere(call, seed):
    name, changes = CALLS[call]
    parts = make(name, seed, **changes)
    test = {*parts["test"].index.tolist()}
    for other, part in parts.items():
        assert other == "test" or not test & {*part.index.tolist()}
        assert isinstance(part, Set) and part.x.dtype == np.float32 and part.x.shape == (len(part), 64)
        for column in (part.y, part.digit, part.index, part.domain):
            assert column.shape == (len(part),) and column.dtype == np.int64


def test_recipe_noisy_labels():
    parts = make("noisy_labels", 1)
    assert {n: len(p) for n, p in parts.items()} == {"train": 200, "valid": 200, "test": 1397}
    wrong = sum(a != b for a, b in zip(parts["train"].y.tolist(), parts["train"].digit.tolist())) / 200
    assert 0.25 < wrong < 0.47
    assert all(parts[n].y.tolist() == parts[n].digit.tolist() for n in ("valid", "test"))


def test_recipe_relabelled():
    parts = make("relabelled", 1)
    assert [len(parts[n]) for n in ("labelled", "unlabelled", "test")] == [25, 600, 472]
    assert all(p.y.tolist() == [d // 2 for d in p.digit.tolist()] for n, p in parts.items() if not n.startswith("source"))
    source = parts["source_digits"]
    assert all(len(p) == 700 and p.index.tolist() == source.index.tolist() for n, p in parts.items() if n.startswith("source"))
    assert parts["source_parity"].y.tolist() == [d % 2 for d in source.digit.tolist()]
    share = {n: np.mean(parts[n].y == source.digit) for n in ("source_noisy", "source_random")}
    assert abs(share["source_noisy"] - 0.46) < 0.06 and abs(share["source_random"] - 0.1) < 0.05
    assert np.allclose(parts["source_inverted"].x, 1 - source.x) and not np.array_equal(parts["source_permuted"].x, source.x)
    assert not {*source.index} & {*parts["labelled"].index, *parts["unlabelled"].index}


def test_recipe_halves():
    a = make("halves", 1, labelled=50, inverted=0.7)
    assert {n: len(p) for n, p in a.items()} == {"source": 901, "target": 50, "test": 846}
    assert {*a["source"].digit.tolist()} == {0, 1, 2, 3, 4} and {*a["test"].digit.tolist()} == {5, 6, 7, 8, 9} and {*a["test"].y.tolist()} == {0, 1, 2, 3, 4}
    assert a["target"].x.max() <= 0.7 + 1e-6 and a["target"].x.mean() > a["source"].x.mean()
    more = make("halves", 1, labelled=80, inverted=0.7)
    assert more["target"].index.tolist()[:50] == a["target"].index.tolist()
    b = make("halves", 1, train=1200, per_class=2, scale=(-1, 1))
    assert len(b["target"]) == 10 and b["source"].x.min() == -1
    part = Digits(1).split(train=1200)["train"]
    train = {*part.index.tolist()}
    assert b["source"].index.tolist() == [i for i, d in zip(part.index.tolist(), part.digit.tolist()) if d < 5]
    assert {*b["source"].index.tolist(), *b["target"].index.tolist()} <= train and not {*b["test"].index.tolist()} & train
    for bad in ({}, dict(labelled=3, per_class=3), dict(labelled=10**4), dict(per_class=10**4)):
        with pytest.raises(ValueError):
            make("halves", 0, **bad)


def test_recipe_domains():
    parts = make("domains", 1)
    source, adapt, test = parts["source"], parts["adapt"], parts["test"]
    assert np.bincount(source.domain).tolist() == [100] * 12 and len(set(source.index.tolist())) == 1200
    assert np.bincount(adapt.domain)[12:].tolist() == [48] * 6 and np.bincount(test.domain)[12:].tolist() == [549] * 6
    assert len(set(test.index.tolist())) == 549 and not {*adapt.index} & {*test.index}
    original = Digits(1).pictures
    x = original.x[np.argsort(original.index)]
    # domains of one site share the permutation: after it, two domains differ by a weak mix only
    a, b, c = (test.x[test.domain == d] for d in (12, 16, 13))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.9 and abs(np.corrcoef(a.ravel(), c.ravel())[0, 1]) < 0.6
    weak = make("domains", 1, strength=0.0)["test"]
    for d in range(12, 18):
        rows = weak[weak.domain == d]
        assert np.array_equal(np.sort(rows.x, 1), np.sort(x[rows.index], 1))


def test_recipe_web():
    parts = make("web", 1)
    pool = parts["pool"]
    assert {n: len(p) for n, p in parts.items()} == {"original": 800, "pool": 3000, "test": 500}
    relevant = pool.digit >= 0
    assert relevant.sum() == 300 and np.array_equal(relevant, pool.domain == 0) and np.array_equal(relevant, pool.index >= 0)
    assert {JUNK[k - 1]: int((pool.domain == k).sum()) for k in range(1, 4)} == {"overlay": 1350, "turned": 675, "blend": 675}
    assert not {*pool.index[relevant]} & {*parts["original"].index} and relevant[:300].mean() < 0.3
    # no junk picture is a turned test picture: those come from the pictures that no part uses
    test = {tuple(v) for p in parts["test"].x.reshape(-1, 8, 8) for k in (1, 3) for v in [np.rot90(p, k).ravel().tolist()]}
    assert not test & {tuple(v) for v in pool[pool.domain == 2].x.tolist()}
    assert len({tuple(v) for v in pool[pool.domain == 2].x.tolist()}) == 675
    assert len(make("web", 1, relevant=100, irrelevant=900)["pool"]) == 1000


def test_make_errors_and_records():
    with pytest.raises(ValueError, match="nearest: noisy_labels"):
        make("noisy_label")
    with pytest.raises(ValueError, match="web has no knob 'relevent' .nearest: relevant"):
        make("web", relevent=3)
    assert set(RECIPES) == {"plain", "noisy_labels", "relabelled", "halves", "domains", "web"}
    part = make("plain")["test"]
    assert part.images.shape == (597, 1, 8, 8) and tuple(part.torch().images.shape) == (597, 1, 8, 8)
    assert part[:3].dataset()["y"][:] == part.y[:3].tolist()
