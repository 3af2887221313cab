"""The world shapes: determinism, exact labels (checked by readers of pixels and cells written apart), splits, hold-outs, shifts, captions, chapters' needs."""
import hashlib
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdbook.worlds.pictures import (BLENDS, SHAPE_AREAS, SHAPE_NAMES, Scenes, assemble, child_keys, colour_table, normals, patches, render,
                                    signed_distance, stream_keys, uniforms)
from kdbook.worlds.scenes import choose, contents, hold_out
from kdbook.worlds.shapes import CONFIGURATIONS, KINDS, WORLD_VERSION, Plan, Shapes, Style, make

HASHES = Path(__file__).with_name("hashes_shapes.json")
SPLITS = ("train", "valid", "test")


# ---- determinism -----------------------------------------------------------------------------------------------------------------
def digest(name: str) -> dict:
    """Hashes of a configuration. Integers are hashed exactly. Noise-free pictures too: they come from +, -, *, / and square roots in float32,
    which IEEE 754 rounds in one way only. Styled pictures (their normal quantiles pass through a library) only by the sum of each, to 1024."""
    world = make(name, seed=3)
    scenes = world.sample(200, split="test")
    sha = lambda *arrays: hashlib.sha256(b"".join(np.ascontiguousarray(a, dtype="<i8").tobytes() for a in arrays)).hexdigest()[:16]
    place = [np.round(getattr(scenes, axis) * 4096) for axis in ("x", "y", "vx", "vy")]
    result = {"scenes": sha(scenes.shape, scenes.colour, scenes.size, scenes.cell, scenes.key, *place), "plain pictures": sha(world.image(scenes[:20], style=Style())),
              "styled pictures": sha(world.image(scenes[:20]).astype(np.int64).sum((1, 2, 3)) // 1024), "held out": sha(make(name, seed=3, held_out=5).held)}
    kinds = KINDS[4:] if world.objects[1] == 1 else KINDS[:4]
    asked = world.questions(scenes, kinds, flip_no=0.3)
    result["questions"] = sha(*(getattr(asked, field.name) for field in fields(asked)))
    objects = world.objects[0] if world.objects[0] < 3 else 2
    told = world.captions(scenes, objects)
    result["captions"] = sha(told, world.perturb(told, scenes, 3))
    web = world.web(100)
    result["web"] = sha(web.captions, web.relevant, np.floor(web.shifts * 4096))
    return result


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_stored_hashes(name):
    """Whoever changes what the world draws raises WORLD_VERSION and stores new hashes: python tests/test_worlds_shapes.py"""
    stored = json.loads(HASHES.read_text())
    assert stored["WORLD_VERSION"] == WORLD_VERSION
    assert digest(name) == stored[name]


def test_equal_in_another_process():
    code = "import sys; sys.path.insert(0, 'tests'); from test_worlds_shapes import digest; import json; print(json.dumps(digest('grid')))"
    root = Path(__file__).resolve().parent.parent
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True).stdout
    assert json.loads(other) == digest("grid")


def same(a: Scenes, b: Scenes) -> bool:
    return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("split", (None, *SPLITS))
def test_longer_draws_extend_shorter_ones(name, split):
    world = make(name)
    assert same(world.sample(300, split=split)[:40], world.sample(40, split=split))


def test_streams_seeds_and_other_draws_are_independent():
    world = make("grid")
    before = world.sample(500)
    world.sample(77, stream="other"), world.questions(before, KINDS[:3]), world.captions(before)
    assert same(before, world.sample(500))
    for other in (world.sample(500, stream="other"), make("grid", seed=1).sample(500), world.sample(500, split="train")):
        assert (other.key != before.key).mean() > 0.99


def test_one_knob_leaves_the_other_choices():
    """More objects keep the first ones; another layout, grid or style keeps classes and counts."""
    few, many = make("grid", objects=(2, 2)).sample(300), make("grid", objects=(4, 4)).sample(300)
    assert np.array_equal(few.colour, many.colour[:, :2]) and np.array_equal(few.cell, many.cell[:, :2])
    for changes in (dict(layout="free"), dict(grid=(5, 4)), dict(sizes=2), dict(style=Style(noise=0.5))):
        other = make("grid", **changes).sample(300)
        assert np.array_equal(other.shape, make("grid").sample(300).shape) and np.array_equal(other.colour, make("grid").sample(300).colour)


def test_pictures_do_not_depend_on_the_batch():
    world = make("single", style=Style(background=(0.1, 0.4), brightness=(0.5, 1), noise=0.1, jitter=2, texture=0.5, rotation=1, blur=0.3))
    scenes = world.sample(300)
    together = world.image(scenes)
    assert np.array_equal(together[131:140], world.image(scenes[131:140]))
    assert np.array_equal(together[[7, 200]], world.image(scenes[[7, 200]]))
    questions = world.questions(scenes, KINDS[4:])
    assert np.array_equal(questions.answer[400:404], world.questions(scenes[100:101], KINDS[4:]).answer)


def test_noise_is_fresh_for_scenes_that_look_alike():
    world = make("cells")
    scenes = world.sample(4000)
    _, first, inverse = np.unique(contents(world, scenes), axis=0, return_index=True, return_inverse=True)
    twin = np.flatnonzero(first[inverse.ravel()] != np.arange(4000))[0]
    original = first[inverse.ravel()[twin]]
    features = world.cells(scenes)
    assert not np.array_equal(features[twin], features[original])
    assert np.array_equal(world.image(scenes[twin], style=Style()), world.image(scenes[original], style=Style()))


# ---- random numbers --------------------------------------------------------------------------------------------------------------
def test_uniforms_pass_simple_tests():
    keys = stream_keys(20000, "test")
    u = uniforms(keys, "a", 8)
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u.ravel()[:50000], "uniform").pvalue > 1e-3
    both = np.concatenate([u, uniforms(keys, "b", 8), np.roll(u, 1, axis=0)], 1)
    off = np.corrcoef(both.T) - np.eye(24)
    assert abs(off).max() < 5 / np.sqrt(20000)
    table = np.histogram2d(u[:, 0], u[:, 1], bins=8, range=((0, 1), (0, 1)))[0]
    assert stats.chisquare(table.ravel()).pvalue > 1e-3
    z = normals(keys, "c", 5)
    assert abs(z.mean()) < 0.015 and abs(z.std() - 1) < 0.01 and stats.kstest(z.ravel(), "norm").pvalue > 1e-3


def test_keys_are_distinct():
    keys = np.concatenate([stream_keys(50000, "a"), stream_keys(50000, "a", 1), child_keys(stream_keys(50000, "a"), "x", 1)[:, 0]])
    assert len(np.unique(keys)) == 150000


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6), st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_choose_takes_a_true_entry(mask, u):
    mask = np.array(mask)
    picked = choose(mask, np.full(len(mask), u))
    for row, place in zip(mask, picked):
        assert place == 5 if not row.any() else row[place]


# ---- pictures --------------------------------------------------------------------------------------------------------------------
def one_object(shape, *, x=0.5, y=0.5, colour=7, size=0, key=1):
    at = lambda value: np.array([[value]])
    zero = np.zeros((1, 1), np.float32)
    return Scenes(at(shape), at(colour), at(size), at(0), zero + np.float32(x), zero + np.float32(y), zero, zero, np.array([key]))


@pytest.mark.parametrize("shape", range(len(SHAPE_NAMES)))
@pytest.mark.parametrize("radius,px", [(0.3, 32), (0.4, 24), (0.2, 64)])
def test_area_within_five_per_cent(shape, radius, px):
    picture = render(one_object(shape, x=0.47, y=0.52), np.ones((8, 3), np.float32), (radius,), px=px)[0, :, :, 0] / 255
    assert abs(picture.sum() / ((radius * px) ** 2 * SHAPE_AREAS[shape]) - 1) < 0.05


@pytest.mark.parametrize("shape", range(len(SHAPE_NAMES)))
def test_the_object_lies_in_its_square(shape):
    picture = render(one_object(shape, x=0.375, y=0.625), colour_table(8), (0.25,), px=64)[0].max(-1)
    rows, columns = np.nonzero(picture > 127)
    assert 24 <= rows.min() and rows.max() < 56 and 8 <= columns.min() and columns.max() < 40
    assert max(rows.max() - rows.min(), columns.max() - columns.min()) >= 27  # and fills it in one direction at least
    rotated = render(one_object(shape), colour_table(8), (0.2,), px=64, style=Style(rotation=1.0))[0]
    assert abs(rotated.sum() / render(one_object(shape), colour_table(8), (0.2,), px=64)[0].sum() - 1) < 0.03


def test_signed_distance_is_below_zero_inside_only():
    assert signed_distance(0, np.float64(0.0), 0.0, 2.0) == -2 and signed_distance(0, 3.0, 4.0, 2.0) == 3
    assert signed_distance(4, 0.0, 0.0, 1.0) > 0  # the hole of the ring
    with pytest.raises(ValueError, match="shape must be 0 to 5, got 6"):
        signed_distance(6, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name not in ("cells", "quadrants")])
def test_default_style_is_the_identity_and_colours_are_right(name):
    world = make(name, style=Style(), px=96)
    scenes = world.sample(100)
    picture = world.image(scenes)
    zeros = {blend: np.zeros(100) for blend in BLENDS}
    assert np.array_equal(picture, world.image(scenes, style=Style(noise=0.0, jitter=0.0, **zeros)))
    row, place = np.nonzero(scenes.shape >= 0)
    at = [np.floor(getattr(scenes, axis)[row, place] * 96).astype(int) for axis in "xy"]
    solid = scenes.shape[row, place] < 4  # all but ring and dome cover their centre
    expected = (colour_table(world.colours)[scenes.colour[row, place]] * 255 + 0.5).astype(np.uint8)
    assert np.array_equal(picture[row, at[1], at[0]][solid], expected[solid])
    assert (picture.max(-1) > 0).mean() < 0.9 and (picture[:, :, :, 0] == 0).any()


def test_blends_are_blends():
    scenes = make("single").sample(30)
    world = make("single", style=Style(), px=24)
    plain = world.image(scenes).astype(float) / 255
    close = lambda style, target: abs(world.image(scenes, style=style) / 255 - target).max() < 1.01 / 255
    assert close(Style(palette=0.45), 0.55 * plain + 0.45 * np.roll(plain, 1, -1))
    assert close(Style(fog=0.55), 0.45 * plain + 0.55 * 0.73)
    assert close(Style(grey=0.6), 0.4 * plain + 0.6 * plain.mean(-1, keepdims=True))
    padded = np.pad(plain, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    box = sum(padded[:, i:i + 24, j:j + 24] for i in range(3) for j in range(3)) / 9
    assert close(Style(blur=0.7), 0.3 * plain + 0.7 * box)
    for blend in BLENDS:
        amounts = np.where(np.arange(30) % 2, 0.8, 0.0)
        mixed = world.image(scenes, style=Style(**{blend: amounts}))
        assert np.array_equal(mixed[::2], world.image(scenes)[::2])
        assert np.array_equal(mixed[1::2], world.image(scenes, style=Style(**{blend: 0.8}))[1::2])


def test_noise_ground_light_and_jitter():
    world, scenes = make("single", px=24, style=Style()), make("single").sample(2000)
    ground = world.image(scenes, style=Style(background=(0.2, 0.4)))[:, 0, 0] / 255
    outside = np.abs(scenes.x[:, 0] - 0.5) < 1  # corners are free in single scenes up to rounding
    assert 0.19 < ground[outside].min() and abs(np.median(ground) - 0.3) < 0.01
    noisy = world.image(scenes, style=Style(background=(0.5, 0.5), noise=0.1))[:, 0, 0] / 255
    assert abs(noisy.std() - 0.1) < 0.004 and abs(noisy.mean() - 0.5) < 0.004
    light = world.image(scenes, style=Style(brightness=(0.6, 1))).max((1, 2, 3)) / world.image(scenes).max((1, 2, 3))
    assert stats.kstest(light, stats.uniform(0.6, 0.4).cdf).statistic < 0.04
    moved = world.image(scenes[:50], style=Style(jitter=1.0)).astype(int)
    assert (abs(moved.sum((1, 2, 3)) / world.image(scenes[:50]).astype(int).sum((1, 2, 3)) - 1) < 0.03).all() and (moved != world.image(scenes[:50])).any()


def test_style_errors():
    for wrong, message in ((dict(fog=1.2), "fog must be in"), (dict(noise=-1), "noise must be >= 0"), (dict(background=(0.5, 0.1)), "background must be a range"),
                           (dict(brightness=(0, 2)), "brightness must be a range"), (dict(grey=np.ones((2, 2))), "grey")):
        with pytest.raises(ValueError, match=message):
            Style(**wrong)
    world = make("single")
    with pytest.raises(ValueError, match="fog must be one number or have one for each of the 4 pictures, got 3"):
        world.image(world.sample(4), style=Style(fog=np.zeros(3)))
    with pytest.raises(ValueError, match="frame"):
        world.image(world.sample(1), frame=1.5)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_patches_reassemble(rows, columns, size, n):
    picture = np.random.default_rng(0).integers(0, 256, (n, 2, rows * size, columns * size, 3), dtype=np.uint8)
    parts = patches(picture, size)
    assert parts.shape == (n, 2, rows * columns, size * size * 3)
    assert np.array_equal(assemble(parts, size, columns * size), picture)


def test_patch_errors_and_cells_are_patches():
    with pytest.raises(ValueError, match="size must divide the picture's 24 x 24 pixels, got 7"):
        patches(np.zeros((1, 24, 24, 3), np.uint8), 7)
    with pytest.raises(ValueError, match="width"):
        assemble(np.zeros((1, 9, 192), np.uint8), 8, 20)
    world = make("grid", style=Style())
    scenes = world.sample(200)
    lit = world.patches(world.image(scenes), 8).max(-1) > 100
    expected = np.zeros((200, 9), bool)
    row, place = np.nonzero(scenes.shape >= 0)
    expected[row, scenes.cell[row, place]] = True
    assert np.array_equal(lit, expected)


def test_tracks_and_video_agree():
    world = make("tracks", shapes=1, objects=(1, 1), grid=(1, 1), radii=(0.1, 0.25))  # circles: the centroid is the centre
    scenes = world.sample(60)
    tracks = world.tracks(scenes, 5, noise=(0, 0, 0)).reshape(60, 5, 6)
    video = world.video(scenes, 5, px=40)
    assert video.shape == (60, 5, 40, 40, 3)
    weight = video.max(-1) / video.max((2, 3, 4))[:, :, None, None]
    middle = (np.arange(40) + 0.5) / 40
    for column, axis in ((0, 2), (1, 3)):
        centroid = (weight.sum(axis) * middle).sum(-1) / weight.sum((2, 3))
        assert abs(centroid - tracks[:, :, column]).max() < 0.004
    radius = np.sqrt(weight.sum((2, 3)) / np.pi) / 40 * 2
    assert abs(radius - tracks[:, :, 2]).max() < 0.01
    assert abs(video.max((2, 3)) / 255 - tracks[:, :, 3:]).max() < 0.01


def test_track_noise_has_three_parts():
    world = make("tracks")
    scenes = world.sample(3000)
    quiet, noisy = (world.tracks(scenes, 6, noise).reshape(3000, 6, 3, 6) for noise in ((0, 0, 0), (0.03, 0.05, 0.02)))
    difference = noisy - quiet
    per_video = difference.mean(1)
    assert abs(per_video[..., 2].std() - np.hypot(0.03, 0.02 / np.sqrt(6))) < 0.001
    assert abs(per_video[..., 3:].std() - np.hypot(0.05, 0.02 / np.sqrt(6))) < 0.001
    assert abs((difference - per_video[:, None]).std() - 0.02 * np.sqrt(5 / 6)) < 0.0005
    assert set(np.unique(quiet[..., 2].round(4))) == {np.float32(0.2), np.float32(0.5)}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_objects_stay_apart_and_inside(name):
    world = make(name)
    scenes = world.sample(2000)
    radius = np.where(scenes.shape >= 0, np.array(world.radii)[scenes.size], 0)
    for time in (0, 1):
        for place, way in ((scenes.x, scenes.vx), (scenes.y, scenes.vy)):
            centre = np.where(scenes.shape >= 0, place + time * way, 0.5)
            assert (centre - radius > -0.001).all() and (centre + radius < 1.001).all()
    for a in range(scenes.shape.shape[1]):
        for b in range(a):
            both = (scenes.shape[:, a] >= 0) & (scenes.shape[:, b] >= 0)
            gap = np.maximum(abs(scenes.x[:, a] - scenes.x[:, b]), abs(scenes.y[:, a] - scenes.y[:, b])) - radius[:, a] - radius[:, b]
            assert (gap[both] > -0.002).all()
    taken = np.where(scenes.cell >= 0, scenes.cell, -1 - np.arange(scenes.cell.shape[1]))
    assert all(len(set(row)) == len(row) for row in taken.tolist())


# ---- distributions, splits, hold-outs --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_even_distributions(name):
    world = make(name, seed=5)
    scenes = world.sample(8000)
    here = scenes.shape >= 0
    if world.layout == "group":
        here[:, 1:] = False
    number = ((scenes.shape * world.colours + scenes.colour) * world.sizes + scenes.size)[here]
    assert stats.chisquare(np.bincount(number, minlength=len(world.attributes))).pvalue > 1e-3
    assert stats.chisquare(np.bincount(scenes.cell[:, 0], minlength=world.grid[0] * world.grid[1])).pvalue > 1e-3
    counts = np.bincount(scenes.count, minlength=world.objects[1] + 1)
    assert counts[:world.objects[0]].sum() == 0 and stats.chisquare(counts[world.objects[0]:]).pvalue > 1e-3 if world.objects[0] < world.objects[1] else True


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_splits_share_no_scene(name):
    world = make(name, seed=2)
    seen = {split: set(map(tuple, contents(world, world.sample(1500, split=split, stream=stream)).tolist()))
            for split in SPLITS for stream in ("scenes",)}
    seen["test"] |= set(map(tuple, contents(world, world.sample(1500, split="test", stream="another")).tolist()))
    assert not seen["train"] & seen["valid"] and not seen["train"] & seen["test"] and not seen["valid"] & seen["test"]
    mixed = contents(world, world.sample(4000))
    assert len(mixed) == 4000 and np.array_equal(mixed, np.sort(mixed, 1))


def test_split_shares_of_the_free_draw():
    from kdbook.worlds.common import content_split
    world = make("grid")
    share = np.bincount(content_split(contents(world, world.sample(20000)))) / 20000
    assert abs(share - [0.8, 0.1, 0.1]).max() < 0.015


def test_a_split_without_scenes_is_an_error():
    world = make("single", layout="grid", radii=(0.1, 0.2))
    with pytest.raises(ValueError, match="too few different scenes"):
        for number in range(48):
            world.sample(5, classes=[number], split="valid")  # four different scenes each


@pytest.mark.parametrize("held_out", [1, 20, 41, (("cross", "red"),), (("circle", "blue", "small"), (1, 1))])
@pytest.mark.parametrize("seed", [0, 1])
def test_hold_outs_are_never_drawn_and_their_values_known(held_out, seed):
    world = make("single", seed=seed, held_out=held_out)
    known, kept = world.known_and_held_out()
    assert not set(known) & set(kept) and len(known) + len(kept) == 48
    for column in range(3):
        assert set(world.attributes[kept, column]) <= set(world.attributes[known, column])
    for split in (None, *SPLITS):
        drawn = set(world.class_id(world.sample(2000, split=split)))
        assert drawn <= set(known) and (len(drawn) == len(known) or split)
    assert set(world.class_id(world.sample(500, classes="held_out"))) <= set(kept)
    assert set(world.class_id(world.sample(3000, classes="all"))) == set(range(48))
    several = make("grid", seed=seed, held_out=(("cross", "red"),))
    scenes = several.sample(3000, skill=np.arange(3000) % 10)
    assert not ((scenes.shape == 3) & (scenes.colour == 0)).any()
    web = several.web(500)
    assert not ((web.shape == 3) & (web.colour == 0)).any()


def test_hold_outs_are_nested_and_bounded():
    masks = [make("single", held_out=n).held for n in (0, 5, 20, 41)]
    assert all((a <= b).all() for a, b in zip(masks, masks[1:])) and [m.sum() for m in masks] == [0, 5, 20, 41]
    with pytest.raises(ValueError, match="held_out must be 0 to"):
        make("single", held_out=48)
    with pytest.raises(ValueError, match="held_out must leave each attribute value known"):
        make("single", held_out=tuple(("cross", colour) for colour in range(6)))
    with pytest.raises(ValueError, match="held_out must be one of .*'croos'.*nearest: cross"):
        make("single", held_out=(("croos", "red"),))
    with pytest.raises(ValueError):
        hold_out(np.array([[0, 0]]), 1, stream_keys(1, "x"))


# ---- the slow reader of pixels, written apart from the world --------------------------------------------------------------------
PALETTE = {"red": (232, 48, 48), "green": (48, 196, 80), "blue": (56, 96, 244), "yellow": (248, 214, 48), "purple": (206, 72, 226), "cyan": (48, 206, 226)}


def read_blob(points, picture):
    """Name, colour and box of a set of lit pixels: a full box is a square; else the points on the way to the four corners of the box tell the shape."""
    ys, xs = [y for y, _ in points], [x for _, x in points]
    top, bottom, left, right = min(ys), max(ys), min(xs), max(xs)
    height, width = bottom - top, right - left
    inner = [(round(top + v * height), round(left + u * width)) in points for v in (0.2, 0.8) for u in (0.2, 0.8)]
    if len(points) > 0.94 * (height + 1) * (width + 1):
        shape = "square"
    else:
        shape = {(True, True, True, True): "circle", (False, False, True, True): "triangle", (False, False, False, False): "cross"}.get(tuple(inner), "unclear")
    brightest = max((picture[y][x] for y, x in points), key=sum)
    colour = min(PALETTE, key=lambda name: sum((a - b) ** 2 for a, b in zip(PALETTE[name], brightest)))
    return dict(shape=shape, colour=colour, x=(left + right + 1) / 2, y=(top + bottom + 1) / 2, extent=max(bottom - top, right - left) + 1)


def read_picture(picture):
    """All objects of a noise-free picture: connected sets of lit pixels that touch at sides or corners, in plain Python."""
    height, width = len(picture), len(picture[0])
    lit = {(y, x) for y in range(height) for x in range(width) if max(picture[y][x]) > 118}
    things = []
    while lit:
        blob, edge = set(), [lit.pop()]
        while edge:
            y, x = edge.pop()
            blob.add((y, x))
            for near in ((y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
                if near in lit:
                    lit.remove(near)
                    edge.append(near)
        things.append(read_blob(blob, picture))
    return things


def answer(things, words, px, small):
    """The answer to a question in words, from what was read."""
    if words[0] == "is-there":
        fits = [t for t in things if all(word in (t["colour"], t["shape"]) for word in words[1:])]
        return "yes" if fits else "no"
    if len(words) > 1:
        fits = [t for t in things if words[1] in (t["colour"], t["shape"])]
        assert len(fits) == 1, "the referent is not unique"
    else:
        fits = things[:1]
    thing = fits[0]
    if words[0] == "where":
        return ("top" if thing["y"] < px / 2 else "bottom") + "-" + ("left" if thing["x"] < px / 2 else "right")
    if words[0] == "what-size":
        return "small" if thing["extent"] < small else "large"
    return thing[words[0].removeprefix("what-")]


def read_world(world, scenes, px):
    return [read_picture(picture) for picture in world.image(scenes, px=px, style=Style()).tolist()]


def check_questions(world, scenes, kinds, px, small=0):
    read = read_world(world, scenes, px)
    asked = world.questions(scenes, kinds)
    wrong = 0
    for text, right, scene in zip(world.text(asked.ids), world.text(asked.answer[:, None]), asked.scene):
        wrong += answer(read[scene], text.split(), px, small) != right
    return len(asked), wrong


def test_pixels_answer_the_questions_of_grid():
    world = make("grid")
    total, wrong = check_questions(world, world.sample(330), KINDS[:4], px=36)
    assert total > 1000 and wrong == 0


def test_pixels_answer_the_questions_of_single():
    world = make("single")
    total, wrong = check_questions(world, world.sample(260), KINDS[4:], px=48, small=24)
    assert total == 1040 and wrong == 0


def test_pixels_give_the_labels_of_transfer():
    world, px = make("transfer"), 96
    scenes = world.sample(150, split="test")
    for i, things in enumerate(read_world(world, scenes, px)):
        assert len(things) == scenes.count[i] == world.label(scenes, "count")[i]
        assert {(t["shape"], t["colour"]) for t in things} == {(world.names["shape"][world.label(scenes, "shape")[i]], world.names["colour"][world.label(scenes, "colour")[i]])}
        assert {answer([t], ["where"], px, 0) for t in things} == {world.names["where"][world.label(scenes, "where")[i]]}
        assert {answer([t], ["what-size"], px, 14) for t in things} == {world.names["size"][world.label(scenes, "size")[i]]}


def test_pixels_confirm_captions():
    world = make("grid")
    scenes = world.sample(250)
    true = world.captions(scenes)
    false = world.perturb(true, scenes, 3)
    for things, good, bad in zip(read_world(world, scenes, 36), world.text(true), world.text(false)[::3]):
        there = {(t["colour"], t["shape"]) for t in things}
        for text, expected in ((good, True), (bad, False)):
            words = text.split()
            assert ({tuple(words[:2]), tuple(words[2:])} <= there) == expected
    web = world.web(250, mismatch=0.5)
    for things, text, relevant in zip(read_world(world, web, 36), world.text(web.captions), web.relevant):
        words = text.split()
        assert ({tuple(words[:2]), tuple(words[2:])} <= {(t["colour"], t["shape"]) for t in things}) == relevant


def test_cells_answer_the_questions():
    """The same from noise-free cell vectors: a second reader that sees no scene table."""
    world = make("cells")
    scenes = world.sample(300)
    names = world.names["shape"] + world.names["colour"]
    asked = world.questions(scenes, KINDS[:4])
    vectors = world.cells(scenes, noise=0).tolist()
    things = [[[name for name, value in zip(names, cell) if value] for cell in scene if any(cell)] for scene in vectors]
    for text, right, scene in zip(world.text(asked.ids), world.text(asked.answer[:, None]), asked.scene):
        words, found = text.split(), things[scene]
        if words[0] == "is-there":
            assert right == ("yes" if any(set(words[1:]) <= set(thing) for thing in found) else "no")
        else:
            meant = [thing for thing in found if words[1] in thing]
            assert len(meant) == 1 and right in meant[0] and right != words[1]
    noise = world.cells(scenes, noise=0.3) - world.cells(scenes, noise=0)
    assert abs(noise.std() - 0.3) < 0.01 and abs(noise.mean()) < 0.01


# ---- questions -------------------------------------------------------------------------------------------------------------------
def test_yes_and_no_are_balanced_and_only_no_is_flipped():
    world = make("grid", seed=1)
    scenes = world.sample(20000)
    yes, no = world.tokens.index("yes"), world.tokens.index("no")
    clean, noisy = (world.questions(scenes, ("is_there_colour", "is_there_both"), flip_no=rate) for rate in (0, 0.35))
    for kind in (2, 3):
        mine = clean.kind == kind
        assert abs((clean.answer[mine] == yes).mean() - 0.5) < 0.02
        for skill in np.unique(clean.skill[mine]):
            some = mine & (clean.skill == skill)
            assert abs((clean.answer[some] == yes).mean() - 0.5) < 5 * 0.5 / np.sqrt(some.sum())
    assert np.array_equal(clean.clean_answer, clean.answer) and np.array_equal(noisy.clean_answer, clean.answer) and np.array_equal(noisy.ids, clean.ids)
    changed = noisy.answer != noisy.clean_answer
    assert set(noisy.clean_answer[changed]) == {no} and set(noisy.answer[changed]) == {yes}
    assert abs(changed[clean.answer == no].mean() - 0.35) < 0.02
    less = world.questions(scenes, ("is_there_colour", "is_there_both"), flip_no=0.2)
    assert (changed >= (less.answer != less.clean_answer)).all()  # nested in the rate


def test_answers_are_even():
    world = make("grid", seed=4)
    asked = world.questions(world.sample(9000), KINDS[:2])
    for kind, values in ((0, 6), (1, 4)):
        share = np.unique(asked.answer[asked.kind == kind], return_counts=True)[1] / (asked.kind == kind).sum()
        assert len(share) == values and share.max() < 1.3 / values
    single = make("single")
    asked = single.questions(single.sample(6000), KINDS[4:])
    for kind, values in ((4, 6), (5, 4), (6, 2), (7, 4)):
        share = np.unique(asked.answer[asked.kind == kind], return_counts=True)[1] / 6000
        assert len(share) == values and share.max() < 1.3 / values


def test_one_question_a_scene_and_kinds_are_mixed():
    world = make("grid")
    scenes = world.sample(3000)
    one = world.questions(scenes, KINDS[:3], per_scene="one")
    assert np.array_equal(np.unique(one.scene), one.scene) and len(one) > 2990
    assert np.bincount(one.kind, minlength=3).min() > 850
    every = world.questions(scenes, KINDS[:3])
    rows = {(s, k): i for i, (s, k) in enumerate(zip(every.scene, every.kind))}
    match = [rows[s, k] for s, k in zip(one.scene, one.kind)]
    assert np.array_equal(every.ids[match], one.ids) and np.array_equal(every.answer[match], one.answer)


def test_skills_are_asked_as_ordered():
    world = make("cells")
    skill = np.repeat(np.arange(10), 100)
    for split in (None, "train", "test"):
        scenes = world.sample(1000, skill=skill, split=split)
        asked = world.questions(scenes, KINDS[:2], skill=skill)
        assert len(asked) == 1000 and np.array_equal(asked.skill, skill) and np.array_equal(asked.scene, np.arange(1000))
    place = (scenes.shape == np.where(skill < 4, skill, 0)[:, None]).argmax(1)[skill < 4]
    assert np.bincount(place, minlength=4).min() > 20  # the referent may stand at any place of the table
    names = world.names["shape"] + world.names["colour"]
    assert [text.split()[1] for text in world.text(asked.ids)[::100]] == list(names)


def test_question_errors():
    world = make("grid")
    scenes = world.sample(50)
    for call, message in ((lambda: world.questions(scenes, ("color_of_shape",)), "nearest: colour_of_shape"), (lambda: world.questions(scenes, ()), "kinds must not be empty"),
                          (lambda: world.questions(scenes, KINDS[:2], flip_no=2), "flip_no"), (lambda: world.questions(scenes, ("is_there_colour",), skill=1), "kinds must be among"),
                          (lambda: world.questions(scenes, KINDS[:2], skill=0), "skill must be one that each scene allows"),
                          (lambda: world.questions(scenes, ("colour",)), "scenes must have one object"), (lambda: world.questions(scenes, ("where",)), "grid must have even"),
                          (lambda: world.sample(5, skill=10), "skill must be 0 to 9"), (lambda: world.sample(5, split="tests"), "split must be one of"),
                          (lambda: world.sample(5, classes=[24]), "classes must be numbers of 0 to 23"), (lambda: world.sample(-1), "n must be >= 0"),
                          (lambda: world.sample(5, classes=[0, 1], skill=9), "skill must be one for which"), (lambda: world.sample(5, classes=np.zeros((5, 3), int)), "classes must have shape"),
                          (lambda: world.class_id(scenes), "to have one class"), (lambda: world.label(scenes, "hue"), "what must be one of")):
        with pytest.raises(ValueError, match=message):
            call()


# ---- words, captions, web ---------------------------------------------------------------------------------------------------------
GERMAN = ("Kreis Quadrat Dreieck Kreuz rot grün blau gelb violett türkis klein groß oben-links oben-rechts unten-links unten-rechts "
          "welche-Farbe welche-Form wie-groß wo bitte jetzt gibt-es ja nein").split()


def test_languages_and_translation():
    invented = [f"w{i}" for i in range(25)]
    world = make("single", words=(Plan().concepts, GERMAN, invented))
    assert world.vocab_size == 76 and len(world.tokens) == 76 and len(set(world.tokens)) == 76
    scenes = world.sample(300)
    asked = world.questions(scenes, KINDS[4:])
    language = np.arange(len(asked)) % 3
    ids, answers = world.translate(asked.ids, language), world.translate(asked.answer, language)
    assert np.array_equal(world.language_of(answers), language) and np.array_equal(world.language_of(ids[:, 0]), language)
    back = world.translate(world.translate(ids, 1), 0)
    assert np.array_equal(back, asked.ids) and (ids[:, 1:] == 0).all()
    assert world.text(world.translate(world.captions(scenes, 1), 1))[0].split() == [GERMAN[i - 1] for i in world.captions(scenes, 1)[0]]
    short = make("single", words=(invented[:22],))
    assert short.vocab_size == 23 and len(short.questions(short.sample(10), KINDS[4:])) == 40
    with pytest.raises(ValueError, match="words must reach to"):
        short.questions(make("grid", sizes=2, words=(invented[:22],)).sample(10), ("is_there_colour",))
    with pytest.raises(ValueError, match="words must be lists of one length, 20 to 25, got lengths \\[3\\]"):
        make("single", words=(("a", "b", "c"),))
    with pytest.raises(ValueError, match="language must be 0 to 2, got 3"):
        world.translate(asked.ids, 3)
    with pytest.raises(ValueError, match="ids must be 0 to 75"):
        world.text(world.translate(np.array([[76]]), 0))


@pytest.mark.parametrize("name,objects,attributes", [("grid", 2, ("colour", "shape")), ("cells", 2, ("shape", "colour")), ("tracks", 3, ("size", "colour", "shape", "where")),
                                                     ("single", 1, ("colour", "shape"))])
def test_captions_are_true_and_perturbed_ones_false(name, objects, attributes):
    world = make(name, seed=6)
    scenes = world.sample(800)
    told = world.captions(scenes, objects, attributes=attributes)
    assert told.shape == (800, objects * len(attributes)) and world.is_true(told, scenes, attributes=attributes).all()
    wrong = world.perturb(told, scenes, 6, attributes=attributes)
    assert wrong.shape == (800, 6, told.shape[1]) and not world.is_true(wrong, scenes, attributes=attributes).any()
    assert all(len({tuple(row) for row in rows}) == 6 for rows in wrong.tolist())
    changed = (wrong != told[:, None]).sum(-1)
    assert changed.min() >= 1 and changed.max() <= 2 and (changed == 1).mean() > 0.7
    assert np.array_equal(world.perturb(told, scenes, 2, attributes=attributes), wrong[:, :2])  # nested


def test_retrieval_lists_of_dcd():
    """Twelve false captions for every scene of the test list, all different; the colour swap comes first in half of the scenes that have one."""
    world = make("cells")
    scenes = world.sample(1000)
    told = world.captions(scenes)
    wrong = world.perturb(told, scenes, 12)
    assert not world.is_true(wrong, scenes).any() and all(len({tuple(row) for row in rows}) == 12 for rows in wrong.tolist())
    swapped = told[:, [2, 1, 0, 3]]
    possible = ~world.is_true(swapped, scenes)
    assert 0.4 < possible.mean() < 0.9
    first = (wrong[:, 0] == swapped).all(1)
    assert abs(first[possible].mean() - 0.53) < 0.05 and not first[~possible].any()
    others = world.captions(world.sample(1000, stream="others"))
    judged = world.is_true(np.stack([told, others], 1), scenes)
    assert judged[:, 0].all() and 0 < judged[:, 1].mean() < 0.05


def test_order_of_mentions_is_random_and_all_objects_can_be_told():
    world = make("grid")
    scenes = world.sample(3000)
    told = world.captions(scenes)
    first = np.flatnonzero(scenes.shape[:, 0] >= 0)
    mention = 1 + world.shapes + scenes.colour[first, 0]
    assert abs((told[first, 0] == mention).mean() - np.mean([(1 / c + (1 - 1 / c) / 6) for c in scenes.count])) < 0.03
    every = world.captions(scenes, None)
    assert every.shape == (3000, 8) and np.array_equal((every > 0).sum(1), 2 * scenes.count) and world.is_true(every, scenes).all()
    padded = world.perturb(every[:400], scenes[:400], 2)
    assert not world.is_true(padded, scenes[:400]).any() and np.array_equal(padded[:, 0] > 0, every[:400] > 0)


def test_caption_errors():
    world = make("grid")
    scenes = world.sample(20)
    told = world.captions(scenes)
    for call, message in ((lambda: world.captions(scenes, 3), "objects must be 1 to 2"), (lambda: world.captions(scenes, attributes=("hue",)), "attributes must be one of"),
                          (lambda: world.is_true(told[:, :3], scenes), "captions must have 2 words for each object"), (lambda: world.is_true(told[:, ::-1], scenes), "in this order"),
                          (lambda: world.is_true(told[:5], scenes), "captions must have shape"), (lambda: world.perturb(told, scenes, 500), "n must be at most")):
        with pytest.raises(ValueError, match=message):
            call()


def test_web_rates_flags_and_styles():
    world = make("grid", seed=8)
    web = world.web(6000, mismatch=0.4, shift=0.5, noise=0.1)
    assert np.array_equal(world.is_true(web.captions, web), web.relevant) and abs(web.relevant.mean() - 0.6) < 0.02
    assert web.shifts[:, :5].max() <= 0.5 and web.shifts[:, 5].max() <= 0.1 and (np.count_nonzero(web.shifts[:, :5], axis=1) <= 1).all()
    assert np.bincount(web.shifts[:, :5].argmax(1), minlength=5).min() > 1000
    picture = world.image(web[:64], style=web[:64].style)
    assert picture.shape == (64, 24, 24, 3) and np.array_equal(world.image(web[60:64], style=web[60:64].style), picture[60:])
    assert web.torch().relevant.dtype.is_floating_point is False
    assert (world.web(500, mismatch=0.2).relevant >= world.web(500, mismatch=0.4).relevant).all()  # nested in the rate
    assert world.web(50, mismatch=1).relevant.sum() == 0 and world.web(50, mismatch=0).relevant.all()
    with pytest.raises(ValueError, match="mismatch"):
        world.web(5, mismatch=1.5)


# ---- forms ------------------------------------------------------------------------------------------------------------------------
def test_datasets_with_images():
    world = make("tracks")
    scenes = world.sample(5)
    plain = world.dataset(scenes, captions=world.captions(scenes))
    assert plain.column_names == ["image", "scene", "objects", "caption"] and plain.features["image"].__class__.__name__ == "Image"
    assert np.array_equal(np.array(plain[3]["image"]), world.image(scenes)[3]) and len(plain[0]["objects"].split()) == 9
    film = world.dataset(scenes, frames=3, px=16)
    assert np.array_equal(np.array(film[2]["video"][1]), world.video(scenes, 3, 16)[2, 1])
    grid = make("grid")
    scenes = grid.sample(4)
    asked = grid.questions(scenes, KINDS[:3])
    rows = grid.dataset(scenes, questions=asked)
    assert len(rows) == len(asked) and rows["answer"] == grid.text(asked.answer[:, None]) and np.array_equal(np.array(rows[-1]["image"]), grid.image(scenes)[-1])
    with pytest.raises(ValueError, match="captions must have one row for each"):
        grid.dataset(scenes, captions=np.zeros((3, 4), int))


def test_tables_as_tensors_and_empty_draws():
    import torch
    world = make("grid")
    table = world.sample(7)
    tensors = table.torch("cpu")
    assert tensors.shape.dtype == torch.int64 and tensors.x.dtype == torch.float32 and torch.equal(tensors.colour, torch.as_tensor(table.colour))
    assert len(table[2]) == 1 and len(table[[1, 5]]) == 2 and len(table[table.count > 2]) == (table.count > 2).sum()
    nothing = world.sample(0, split="test")
    assert world.image(nothing).shape == (0, 24, 24, 3) and world.video(nothing, 2).shape == (0, 2, 24, 24, 3) and world.cells(nothing).shape == (0, 9, 10)
    assert world.captions(nothing).shape == (0, 4) and len(world.questions(nothing, KINDS[:3])) == 0 and world.tracks(nothing).shape == (0, 6, 24)
    assert world.perturb(world.captions(nothing), nothing, 2).shape == (0, 2, 4) and len(world.web(0)) == 0 and world.text(world.captions(nothing)) == []


def test_make_names_the_nearest():
    with pytest.raises(ValueError, match="'singel' .nearest: single"):
        make("singel")
    with pytest.raises(ValueError, match="grid has no knob 'color' .nearest: colours"):
        make("grid", color=3)
    for wrong, message in ((dict(shapes=7), "shapes must be 1 to 6, got 7"), (dict(layout="wild"), "layout must be one of"), (dict(objects=(0, 2)), "objects must be a range within 1 to 9"),
                           (dict(objects=(2, 10)), "objects must be"), (dict(radii=(0.2,)), "radii must be 1 numbers above 0 and at most 0.167"), (dict(grid=(0, 3)), "grid must have")):
        with pytest.raises(ValueError, match=message):
            make("grid", **wrong)
    assert make("single", sizes=3).radii == (0.1, 0.16, 0.225) and len(make("tracks", colours=40).concepts) == 59
    assert isinstance(make("cells"), Shapes) and make("cells").px == 16


# ---- every chapter's row ------------------------------------------------------------------------------------------------------------
def test_rows_of_the_requirements():
    # centurio: 32 px, one object, ten languages, one-word questions
    languages = [[f"{i}-{language}" for i in range(25)] for language in range(10)]
    world = make("quadrants", words=languages)
    train = world.sample(1500)
    asked = world.questions(train, KINDS[4:])
    assert world.image(train).shape == (1500, 32, 32, 3) and world.translate(asked.ids, np.arange(6000) % 10).max() < world.vocab_size == 251
    assert len(world.sample(300, stream="test")) == 300 and world.style.noise == 0.1 and world.style.jitter == 1
    # comd, dcd
    world = make("cells")
    rank = np.arange(1, 11) ** -1.8
    skill = np.random.default_rng(0).choice(10, 400, p=rank / rank.sum())
    pool = world.sample(400, skill=skill)
    assert world.cells(pool).shape == (400, 4, 10) and len(world.questions(pool, KINDS[:2], skill=skill)) == 400
    assert {*pool.count} <= {2, 3, 4}
    # llava_kd, llava_mod
    world = make("grid")
    scenes = world.sample(1500)
    for kinds in (KINDS[:3], ("colour_of_shape", "is_there_colour")):
        assert 1480 < len(world.questions(scenes, kinds, flip_no=0.35, per_scene="one")) <= 1500
    assert world.patches(world.image(scenes), 8).shape == (1500, 9, 192)
    # mulki, vlm_ood
    for style in (Style(palette=0.45, noise=0.12), Style(fog=0.55, noise=0.1), Style(grey=0.6, noise=0.1), Style(blur=0.7, palette=0.3)):
        world = make("single", px=16, style=style)
        task = world.sample(240, classes=np.repeat(np.arange(12), 20)[:, None])
        assert world.image(task).shape == (240, 16, 16, 3) and np.array_equal(world.class_id(task), np.repeat(np.arange(12), 20))
    world = make("single", held_out=20, px=16, style=Style(background=(0, 0.35), brightness=(0.6, 1), noise=0.12))
    known, kept = world.known_and_held_out()
    assert (len(known), len(kept)) == (28, 20) and len(world.class_names()) == 48
    assert np.array_equal(world.class_id(world.sample(840, classes=np.repeat(known, 30)[:, None], split="train")), np.repeat(known, 30))
    assert set(world.class_id(world.sample(1200, classes="held_out", split="test"))) == set(kept)
    # vidlankd: each noun has a size and a colour of its own
    world = make("tracks", colours=40)
    nouns = np.random.default_rng(0).integers(0, 40, (6000, 3))
    size = np.random.default_rng(1).integers(0, 2, 40)
    videos = world.sample(6000, classes=(nouns % 4 * 40 + nouns) * 2 + size[nouns])
    tracks = world.tracks(videos)
    assert tracks.shape == (6000, 6, 18) and np.array_equal(videos.colour, nouns) and np.array_equal(videos.size, size[nouns])
    radius = tracks.reshape(6000, 6, 3, 6).mean(1)[..., 2]
    assert ((radius > 0.35) == (size[nouns] == 1)).all()
    # transfer: krr_st, dmae, similar_tasks, further_pretraining
    world = make("transfer")
    scenes = world.sample(1200, split="train")
    assert world.patches(world.image(scenes), 4).shape == (1200, 64, 48)
    labels = np.stack([world.label(scenes, what) for what in ("shape", "colour", "size", "where", "count")])
    assert abs(np.corrcoef(labels) - np.eye(5)).max() < 0.15
    assert world.image(scenes[:5], style=Style(texture=0.8, noise=0.1, background=(0.2, 0.5))).shape == (5, 32, 32, 3)


if __name__ == "__main__":
    HASHES.write_text(json.dumps({"WORLD_VERSION": WORLD_VERSION} | {name: digest(name) for name in CONFIGURATIONS}, indent=1) + "\n")
