"""The world of spoken commands: words, intents, both renderings, splits and data sets."""
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_hashes import check_hashes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdbook.worlds.common import fingerprint
from kdbook.worlds.speech import (CONFIGURATIONS, CONSONANTS, CONTRAST, PEAK, SYLLABLES, VOWELS, WORLD_VERSION, Speech, class_incremental, log_mel, make, mel,
                                  syllable_track, to_bins)

ROOT = Path(__file__).resolve().parent.parent


def hash_of(name, seed=0, **changes):
    world = make(name, seed, **changes)
    u = world.sample(per_intent=4, split="train")
    r = world.random_words(30)
    return fingerprint(world.lexicon, world.voices, world.tracks, u.words, u.intent, u.slots, u.speaker, u.duration, u.start, u.shift, u.gain, u.pitch, r.words, r.duration,
                       world.frames(u), world.waveform(u[:8]), log_mel(world.waveform(u[:8])), world.sample(20, split="test").words, class_incremental(20, 5, seed))


def test_stored_hashes():
    hashes = {name: hash_of(name) for name in CONFIGURATIONS} | {"commands/speakers=12": hash_of("commands", speakers=12)}
    check_hashes("speech", WORLD_VERSION, hashes)


def test_two_processes_agree():
    code = "from test_worlds_speech import *; print(hash_of('commands', 4))"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env={**env, "PYTHONHASHSEED": h}).stdout.strip() for h in "12"}
    assert runs == {hash_of("commands", 4)}


def test_mel_scale():
    assert abs(float(mel(1000)) - 1000) < 1 and float(mel(0)) == 0
    for f in (150, 440, 3700):
        assert math.isclose(float(mel(f)), 1127.01048 * math.log(1 + f / 700), rel_tol=1e-4)
    assert np.allclose(to_bins([150, 3700]), [0, 19]) and (np.diff(to_bins(np.arange(150, 3700, 10))) > 0).all()


def test_syllables_end_in_their_vowel():
    assert len(SYLLABLES) == 45
    for s in SYLLABLES:
        track = syllable_track(s)
        assert track.shape == (16, 9) and np.allclose(track[-1, :3], to_bins(VOWELS[s[1]])) and np.allclose(track[0, :3], to_bins(CONSONANTS[s[0]][0]))
        assert track[0, 7] == CONSONANTS[s[0]][3] and track[-1, 7] == 0 and (track[:, 3:8] >= 0).all()
    with pytest.raises(ValueError, match="syllable"):
        syllable_track("zz")


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_lexicon(seed):
    world = Speech(seed=seed)
    parts = [w[i:i + 2] for w in world.lexicon for i in (0, 2)]
    assert len(world.lexicon) == world.word_count == 13 and len(set(parts)) == 26 and set(parts) <= set(SYLLABLES)
    assert Speech(fillers=9, seed=seed).lexicon[:13] == world.lexicon
    big = Speech(actions=20, objects=20, fillers=20, seed=seed).lexicon
    assert len(big) == len(set(big)) == 60


@pytest.mark.parametrize("changes", [{}, dict(actions=3, objects=7, fillers=2, speakers=5)])
def test_transcripts_tell_intents(changes):
    world = make("commands", 3, **changes)
    u = world.sample(1000)
    words = world.lexicon
    actions, objects, fillers = words[:world.actions], words[world.actions:world.actions + world.objects], words[world.actions + world.objects:]
    orders = 0
    for text, intent, slots in zip(world.transcript(u), u.intent.tolist(), u.slots.tolist()):
        said = text.split()
        assert len(said) == 4 and said[0] in fillers and said[2] in fillers
        first_is_action = said[1] in actions
        action, thing = (said[1], said[3]) if first_is_action else (said[3], said[1])
        orders += first_is_action
        assert [actions.index(action), objects.index(thing)] == slots and intent == actions.index(action) * len(objects) + objects.index(thing)
    assert 420 < orders < 580
    assert stats.chisquare(np.bincount(world.sample(20_000).intent)).pvalue > 1e-4
    r = world.random_words(2000)
    assert (r.intent == -1).all() and (r.slots == -1).all() and stats.chisquare(np.bincount(r.words.ravel(), minlength=world.word_count)).pvalue > 1e-4


def test_performances_stay_in_their_ranges():
    world = Speech(seed=1)
    u = world.sample(5000)
    assert {*u.duration.ravel().tolist()} == {5, 6, 7, 8} and {*u.shift.ravel().tolist()} == {-1, 0, 1}
    assert u.gain.min() >= 0.7 and u.gain.max() <= 1.3 and (u.start >= 0).all() and (u.start + u.duration.sum(1) <= 40).all() and (u.start + u.duration.sum(1) == 40).any()
    assert np.abs(u.pitch - 120).max() <= 6 and (u.speaker == 0).all()
    crowd = Speech(speakers=8, seed=1)
    v = crowd.sample(4000)
    assert stats.chisquare(np.bincount(v.speaker)).pvalue > 1e-4 and (v.start + v.duration.sum(1) <= 40).all()
    pace = np.array([v.duration[v.speaker == s].mean() for s in range(8)])
    assert np.abs(pace - [np.mean([round(d * p) for d in (5, 6, 7, 8)]) for p in crowd.voices[:, 1]]).max() < 0.1
    assert np.array_equal(crowd.voices[:3], Speech(speakers=3, seed=1).voices) and crowd.voices[0].tolist() == [120, 1, 0]
    assert crowd.voices[:, 0].min() >= 90 and crowd.voices[:, 0].max() <= 200


def content(u):
    return [tuple(row) for row in np.column_stack([u.words, u.speaker, u.duration, u.start, u.shift]).tolist()]


def test_splits_and_nesting():
    world = Speech(seed=2)
    parts = {s: world.sample(per_intent=30, split=s) for s in ("train", "valid", "test")}
    sets = {s: set(content(u)) for s, u in parts.items()}
    assert not sets["train"] & sets["test"] and not sets["train"] & sets["valid"] and not sets["valid"] & sets["test"]
    assert all(np.bincount(u.intent).tolist() == [30] * 20 for u in parts.values())
    small = world.sample(per_intent=7, split="train")
    for intent in range(20):
        assert content(small[small.intent == intent]) == content(parts["train"][parts["train"].intent == intent])[:7]
    assert content(world.sample(50)) == content(world.sample(5000))[:50] and content(world.random_words(20)) == content(world.random_words(400))[:20]
    assert content(world.sample(50)) != content(world.sample(50, stream="other")) and len(world.sample(0)) == 0 and len(world.sample(per_intent=0)) == 0
    # 60 + 25 for each intent, and more than one block of draws
    assert len(world.sample(per_intent=400)) == 8000


def test_noise_bins_and_shift_leave_the_words():
    a, b = Speech(seed=3), Speech(seed=3, bins=40, noise=1.0)
    assert content(a.sample(40)) == content(b.sample(40))
    assert Speech(seed=3, fillers=8).sample(40).slots.tolist() == a.sample(40).slots.tolist()


def slow_picture(world, u, i):
    """One noiseless picture, cell by cell, in plain Python."""
    picture = [[0.0] * world.bins for _ in range(world.length)]
    step = 19 / (world.bins - 1)
    begin = int(u.start[i])
    for k in range(4):
        duration, word = int(u.duration[i, k]), int(u.words[i, k])
        track = [row for half in (world.lexicon[word][:2], world.lexicon[word][2:]) for row in syllable_track(half).tolist()]
        shift = float(u.shift[i, k]) * step + float(world.voices[u.speaker[i], 2])
        for t in range(duration):
            place = min(max((t + 0.5) / duration * 32 - 0.5, 0), 31)
            low = min(int(place), 30)
            row = [a + (b - a) * (place - low) for a, b in zip(track[low], track[low + 1])]
            for b in range(world.bins):
                at = b * step - shift
                level = sum(row[3 + f] * math.exp(-((at - row[f]) ** 2) / (2 * 0.9**2)) for f in range(3))
                level += row[7] * math.exp(-((at - row[6]) ** 2) / (2 * row[8] ** 2))
                picture[begin + t][b] = 2.5 * float(u.gain[i, k]) * level
        begin += duration
    return picture


@pytest.mark.parametrize("changes", [{}, dict(bins=33, speakers=4, shift=2)])
def test_frames_agree_with_the_slow_picture(changes):
    world = Speech(seed=6, **changes)
    u = world.sample(15)
    clean, noisy = world.frames(u, noise=0.0), world.frames(u)
    assert clean.shape == (15, 40, world.bins) and clean.dtype == np.float32
    for i in range(15):
        assert np.allclose(clean[i], slow_picture(world, u, i), atol=1e-4)
    assert abs((noisy - clean).std() - 0.4) < 0.01
    many = world.sample(1100)
    assert np.array_equal(world.frames(many)[:700], world.frames(many[:700])) and not np.array_equal(world.frames(u), world.frames(u, "again"))
    assert world.frames(u[:0]).shape == (0, 40, world.bins)


def test_words_are_separable_by_nearest_template():
    world = Speech(seed=7)
    templates = {}
    for length in (5, 6, 7, 8):
        for shift in (-1, 0, 1):
            said = world.frames(world.say(np.repeat(np.arange(13)[:, None], 4, 1), duration=length, shift=shift), noise=0.0)[:, :length].reshape(13, -1)
            templates[length, shift] = said / np.linalg.norm(said, axis=1, keepdims=True)
    for noise, least in ((0.0, 1.0), (0.4, 0.98)):
        u = world.random_words(250, stream="nearest")
        pictures, right = world.frames(u, noise=noise), 0
        for picture, words, start, durations in zip(pictures, u.words.tolist(), u.start.tolist(), u.duration.tolist()):
            for word, length in zip(words, durations):
                cut = picture[start:start + length].ravel()
                best = max((float(score), k) for shift in (-1, 0, 1) for k, score in enumerate(templates[length, shift] @ cut))
                right, start = right + (best[1] == word), start + length
        assert right / 1000 >= least


@pytest.mark.parametrize("speakers", [1, 6])
def test_sound_agrees_with_frames(speakers):
    world = Speech(speakers=speakers, seed=8)
    u = world.sample(60)
    sound = world.waveform(u)
    assert sound.shape == (60, 8000) and sound.dtype == np.float32 and np.abs(sound).max() <= 1 and (np.abs(sound) >= 0.999).mean() < 1e-4
    a, b = world.frames(u, noise=0.0), log_mel(sound)
    assert a.shape == b.shape
    correlation = np.array([np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b)])
    assert correlation.mean() > 0.9 and correlation.min() > 0.8
    silent = a.max(2) == 0
    silent &= np.roll(silent, 1, 1) & np.roll(silent, -1, 1)  # windows reach into the neighbours
    silent[:, [0, -1]] = False
    assert silent.any() and b[silent].max() < 0.05
    assert 0.9 < np.polyfit(a.ravel(), b.ravel(), 1)[0] / (2 * CONTRAST) < 1.15
    assert np.array_equal(world.waveform(u[:20]), sound[:20])


def test_formants_stand_where_the_table_says():
    world = Speech(seed=9)
    said = world.say(np.repeat(np.arange(13)[:, None], 4, 1), duration=8)
    clean, heard = world.frames(said, noise=0.0), log_mel(world.waveform(said))
    for k, word in enumerate(world.lexicon):
        first, second = to_bins(VOWELS[word[1]])[:2]
        assert abs(int(clean[k, 2].argmax()) - first) < 1.5 or abs(int(clean[k, 2].argmax()) - second) < 1.5
        assert min(abs(int(heard[k, 2].argmax()) - f) for f in to_bins(VOWELS[word[1]])) < 2
        assert clean[k].max() <= PEAK * 2.2


def test_pitch_is_heard():
    world = Speech(speakers=6, seed=10)
    vowel = next(k for k, w in enumerate(world.lexicon) if w[0] in "mnlr" and w[2] in "mnlr")
    for speaker in range(6):
        u = world.say(np.full((1, 4), vowel), speaker=speaker, start=2)
        piece = world.waveform(u)[0, 1000:5000].astype(float)
        correlation = np.correlate(piece, piece, "full")[len(piece) - 1:]
        shortest = int(8000 / 260)
        period = shortest + correlation[shortest:120].argmax()
        octave = 8000 / period / world.voices[speaker, 0]
        assert min(abs(octave - 1), abs(octave - 0.5) * 2) < 0.1, (speaker, 8000 / period, world.voices[speaker])


def test_rates_and_bins():
    world = Speech(seed=11, length=60)
    u = world.sample(12)
    slow, fast = world.waveform(u, 8000), world.waveform(u, 16000)
    assert slow.shape == (12, 12000) and fast.shape == (12, 24000)
    for bins in (20, 40, 64):
        finer = Speech(seed=11, length=60, bins=bins)
        plain = finer.frames(u, noise=0.0) if bins == 20 else None
        a, b = log_mel(slow, bins), log_mel(fast, bins, rate=16000)
        assert a.shape == b.shape == (12, 60, bins)
        if plain is not None:
            for picture in (a, b):
                assert np.mean([np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(plain, picture)]) > 0.85
    for call in (lambda: world.waveform(u, 4000), lambda: world.waveform(u, 8050), lambda: log_mel(slow[0]), lambda: log_mel(slow, 2), lambda: log_mel(slow[:, :50]), lambda: log_mel(slow, rate=44100)):
        with pytest.raises(ValueError, match="rate|waveform"):
            call()
    noisy = world.waveform(u, noise=0.05)
    assert abs((noisy - slow).std() - 0.05) < 0.002


@given(st.integers(0, 10**9))
@settings(max_examples=20, deadline=None)
def test_class_incremental_deals_every_class_once(seed):
    deal = class_incremental(20, 5, seed)
    assert deal.shape == (5, 4) and sorted(deal.ravel().tolist()) == list(range(20))


def test_class_incremental_edges():
    assert class_incremental(6, 6).shape == (6, 1) and class_incremental(6, 1).shape == (1, 6)
    assert class_incremental(20, 5, 0).tolist() != class_incremental(20, 5, 1).tolist()
    for bad in ((20, 3), (0, 1), (5, 0)):
        with pytest.raises(ValueError, match="classes must be a multiple"):
            class_incremental(*bad)


def test_dataset_with_audio():
    import soundfile
    world = Speech(speakers=3, seed=12)
    u = world.sample(5)
    table = world.dataset(u)
    assert table.column_names == ["audio", "transcript", "intent", "action", "object", "speaker"] and type(table.features["audio"]).__name__ == "Audio"
    sound = world.waveform(u)
    for i, row in enumerate(table):
        heard, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
        assert rate == 8000 and np.abs(heard - sound[i]).max() < 1e-4
        assert row["transcript"] == world.transcript(u)[i] and (row["intent"], row["action"], row["object"], row["speaker"]) == (u.intent[i], *u.slots[i], u.speaker[i])
    assert tuple(u.torch().words.shape) == (5, 4) and u.dataset().num_rows == 5


def test_errors():
    for knobs in (dict(actions=0), dict(speakers=0), dict(speed=(0, 5)), dict(speed=(8, 5)), dict(gain=(1.0,)), dict(bins=3), dict(shift=-1), dict(noise=-0.1), dict(length=31),
                  dict(length=35, speakers=2), dict(fillers=600)):
        with pytest.raises(ValueError, match=next(iter(knobs))):
            Speech(**knobs)
    world = Speech()
    for call in (lambda: world.sample(), lambda: world.sample(3, per_intent=3), lambda: world.sample(-1), lambda: world.sample(3, split="tset"), lambda: world.say([[0, 1, 2, 13]]),
                 lambda: world.say([[0, 1, 2]]), lambda: world.say([[0, 1, 2, 3]], duration=11), lambda: world.say([[0, 1, 2, 3]], speaker=1)):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(ValueError, match="nearest: commands"):
        make("comands")
    with pytest.raises(ValueError, match="commands has no knob 'speaker' .nearest: speakers"):
        make("commands", speaker=3)
