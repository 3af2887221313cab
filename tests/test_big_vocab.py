"""kdbook.big_vocab: chunked losses equal the dense ones, the teacher cache survives what disks and killed jobs do, the tails of top-k losses."""
import importlib.util
import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdbook.big_vocab import TeacherCache, linear_distill_loss, topk_loss
from kdbook.losses import forward_kl, jsd, reverse_kl

torch.set_num_threads(1)
quick = settings(max_examples=25, deadline=None)
DENSE = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def parts(rows=7, classes=11, student_width=3, teacher_width=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((rows, student_width), (classes, student_width), (rows, teacher_width), (classes, teacher_width))]


def run(function, tensors, upstream=1.0, **options):
    hidden, weight = (x.clone().requires_grad_() for x in tensors[:2])
    value = function(hidden, weight, *tensors[2:], **options)
    (upstream * value).backward()
    return value.detach(), hidden.grad, weight.grad


def dense(student_hidden, student_weight, teacher_hidden, teacher_weight, loss=forward_kl, **options):
    return loss(student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T, **options)


# ---------------------------------------------------------------- chunked losses
def test_golden_numbers(shared):
    spec = importlib.util.spec_from_file_location("check_golden", shared / "tools" / "check_golden.py")
    checker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checker)
    cases = [case for case in json.loads((shared / "golden/foundations/losses.json").read_text())["cases"] if case["call"].startswith("kdbook.big_vocab.")]
    assert len(cases) == 3
    assert [checker.check(case) for case in cases] == [None] * 3


@quick
@given(st.sampled_from(list(DENSE)), st.integers(0, 1000), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(0.5, 4.0), st.integers(1, 9), st.booleans())
def test_value_and_gradients_equal_the_dense_loss(divergence, seed, beta, temperature, chunk_size, masked):
    tensors = parts(seed=seed)
    mask = torch.rand(7, generator=torch.Generator().manual_seed(seed)) > 0.4 if masked else None
    extra = {"beta": beta} if divergence == "jsd" else {}
    small = run(linear_distill_loss, tensors, 3.0, divergence=divergence, beta=beta, temperature=temperature, mask=mask, chunk_size=chunk_size)
    large = run(dense, tensors, 3.0, loss=DENSE[divergence], temperature=temperature, mask=mask, **extra)
    for a, b in zip(small, large):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", list(DENSE))
def test_gradients_match_finite_differences(divergence):
    hidden, weight, teacher_hidden, teacher_weight = parts(4, 5)
    loss = lambda h, w: linear_distill_loss(h, w, teacher_hidden, teacher_weight, divergence=divergence, chunk_size=3, temperature=1.5)
    assert gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


def test_gradient_is_given_only_where_it_is_wanted_and_only_once():
    hidden, weight, teacher_hidden, teacher_weight = parts()
    loss = linear_distill_loss(hidden.requires_grad_(), weight, teacher_hidden.requires_grad_(), teacher_weight.requires_grad_())
    loss.backward()
    assert hidden.grad is not None and weight.grad is None and teacher_hidden.grad is None and teacher_weight.grad is None
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(linear_distill_loss(hidden, weight, teacher_hidden, teacher_weight), hidden, create_graph=True)
    with torch.no_grad():
        assert not linear_distill_loss(hidden, weight, teacher_hidden, teacher_weight).requires_grad


def test_nothing_counted_is_zero_with_zero_gradients():
    value, hidden_gradient, weight_gradient = run(linear_distill_loss, parts(), mask=torch.zeros(7, dtype=torch.bool))
    assert value == 0 and not hidden_gradient.any() and not weight_gradient.any()
    assert run(linear_distill_loss, parts(rows=0))[0] == 0


def test_masked_rows_may_hold_anything():
    tensors = parts()
    mask = torch.tensor([True, True, False, True, True, True, True])
    expected = run(linear_distill_loss, tensors, mask=mask)
    tensors[0][2], tensors[2][2] = float("nan"), float("inf")
    got = run(linear_distill_loss, tensors, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(expected, got)) and not got[1][2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    tensors = parts(rows=64, classes=500, student_width=8, teacher_width=8, dtype=dtype)
    value, hidden_gradient, weight_gradient = run(linear_distill_loss, tensors, upstream=64.0, chunk_size=10)
    assert value.dtype == torch.float32 and hidden_gradient.dtype == weight_gradient.dtype == dtype
    exact = run(dense, [x.double() for x in tensors], upstream=64.0)
    assert math.isclose(value.item(), exact[0].item(), rel_tol=0.02)
    for a, b in zip((hidden_gradient, weight_gradient), exact[1:]):
        assert (a.double() - b).norm() < 0.02 * b.norm()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __enter__(self):
        self.numel = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.numel = max([self.numel] + [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)])
        return result


@pytest.mark.parametrize("divergence", list(DENSE))
def test_never_holds_a_matrix_of_positions_times_classes(divergence):
    tensors = parts(rows=100, classes=300)
    with Largest() as chunked:
        run(linear_distill_loss, tensors, divergence=divergence, chunk_size=10)
    with Largest() as full:
        run(dense, tensors, loss=DENSE[divergence])
    assert full.numel == 100 * 300 and chunked.numel == 10 * 300


@pytest.mark.parametrize("change, message", [
    (dict(student_hidden=torch.zeros(7)), r"student_hidden must have two axes, got shape \(7,\)"),
    (dict(student_weight=torch.zeros(11, 4)), r"student_weight must have shape \(11, 3\), got \(11, 4\)"),
    (dict(teacher_hidden=torch.zeros(6, 5)), r"teacher_hidden must have shape \(7, 5\), got \(6, 5\)"),
    (dict(teacher_weight=torch.zeros(11, 4)), r"teacher_weight must have shape \(11, 5\), got \(11, 4\)"),
    (dict(teacher_weight=torch.zeros(12, 5)), r"share one vocabulary, got 11 and 12 classes"),
    (dict(divergence="tv"), r"divergence must be one of 'forward_kl', 'reverse_kl', 'jsd', got 'tv'"),
    (dict(beta=-0.5), r"beta must be in \[0, 1\], got -0.5"),
    (dict(temperature=0), r"temperature must be > 0, got 0"),
    (dict(mask=torch.ones(7)), r"mask must be a bool tensor of shape \(7,\), got torch.float32"),
    (dict(chunk_size=0), r"chunk_size must be at least 1, got 0"),
])
def test_bad_arguments_of_the_linear_loss_are_named(change, message):
    arguments = dict(zip(("student_hidden", "student_weight", "teacher_hidden", "teacher_weight"), parts())) | change
    with pytest.raises(ValueError, match=message):
        linear_distill_loss(arguments.pop("student_hidden"), arguments.pop("student_weight"), arguments.pop("teacher_hidden"), arguments.pop("teacher_weight"), **arguments)


# ---------------------------------------------------------------- cache
def logits(rows, classes=9, seed=0):
    return 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def write(folder, rows=10, top_k=4, shard_rows=4, **options):
    with TeacherCache(folder, "w", top_k=top_k, vocab_size=9, shard_rows=shard_rows, **options) as cache:
        cache.append(logits(10)[:rows])
    return folder


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(1, 6))
def test_round_trip_in_any_portions_and_shards(tmp_path_factory, portions, shard_rows):
    folder, all_logits = tmp_path_factory.mktemp("cache") / "nested" / "cache", logits(sum(portions))
    with TeacherCache(folder, "w", top_k=3, vocab_size=9, shard_rows=shard_rows) as cache:
        for portion in all_logits.split(portions):
            cache.append(portion)
        assert len(cache) == len(all_logits)
    cache = TeacherCache(folder)
    expected = all_logits.log_softmax(-1).topk(3)
    indices, logprobs = cache[:]
    assert len(cache) == len(all_logits) and torch.equal(indices, expected.indices) and torch.equal(logprobs, expected.values)
    assert all(shard["rows"] <= shard_rows for shard in json.loads((folder / "index.json").read_text())["shards"])
    cache.verify()


def test_lookup_by_number_slice_and_tensor(tmp_path):
    cache, expected = TeacherCache(write(tmp_path / "c")), logits(10).log_softmax(-1).topk(4)
    for rows in (3, -1, slice(2, 9, 3), [9, 0, 4, 4], torch.tensor([[0, 9], [3, 4]]), torch.tensor([], dtype=torch.int64), torch.tensor([7], dtype=torch.int32)):
        indices, logprobs = cache[rows]
        picked = torch.arange(10)[rows if isinstance(rows, slice) else torch.as_tensor(rows).long()]
        assert indices.dtype == torch.int64 and logprobs.dtype == torch.float32
        assert torch.equal(indices, expected.indices[picked]) and torch.equal(logprobs, expected.values[picked])
    for rows in (10, -11, [0, 99], torch.tensor([True]), 0.5):
        with pytest.raises(IndexError, match="rows must be"):
            cache[rows]
    assert len(list(cache)) == 10


def test_leading_axes_become_rows_and_top_k_of_a_server_can_be_stored(tmp_path):
    with TeacherCache(tmp_path / "c", "w", top_k=2, vocab_size=9) as cache:
        cache.append(logits(6).reshape(2, 3, 9))
        cache.append_top_k(torch.tensor([[5, -100]]), torch.tensor([[-0.5, 0.0]]))
    cache = TeacherCache(tmp_path / "c")
    assert len(cache) == 7 and cache[6][0].tolist() == [5, -100] and cache[6][1][0] == -0.5


@pytest.mark.parametrize("dtype, tolerance", [("float32", 0), ("float16", 1e-2), ("bfloat16", 1e-1)])
def test_stored_precision(tmp_path, dtype, tolerance):
    cache = TeacherCache(write(tmp_path / "c", dtype=dtype))
    assert (cache[:][1] - logits(10).log_softmax(-1).topk(4).values).abs().max() <= tolerance


def test_impossible_classes_survive(tmp_path):
    z = torch.tensor([[0.0, 0.0, -math.inf]])
    with TeacherCache(tmp_path / "c", "w", top_k=3, vocab_size=3) as cache:
        cache.append(z)
    indices, logprobs = TeacherCache(tmp_path / "c")[:]
    assert logprobs[0, 2] == -math.inf
    student = torch.zeros(1, 3, requires_grad=True)
    for tail in ("bucket", "renormalise"):
        value = topk_loss(student, indices, logprobs, tail=tail)
        value.backward()
        assert math.isclose(value.item(), forward_kl(student, z).item(), rel_tol=1e-6) and torch.isfinite(student.grad).all()


def test_reading_maps_the_files_instead_of_loading_them(tmp_path):
    cache = TeacherCache(write(tmp_path / "c", rows=8))
    before = cache[5][1].clone()
    path = tmp_path / "c" / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last byte belongs to the last stored number; a copy in memory would not notice
    with open(path, "r+b") as file:
        file.write(content)
    assert torch.equal(cache[5][1], before)
    with pytest.raises(ValueError, match="shard-00001.safetensors has changed since it was written"):
        cache.verify()


def test_append_mode_goes_on(tmp_path):
    write(tmp_path / "c", rows=6, source="teacher A")
    with TeacherCache(tmp_path / "c", "a", source="teacher A", shard_rows=4) as cache:
        assert len(cache) == 6
        cache.append(logits(10)[6:])
    assert torch.equal(TeacherCache(tmp_path / "c")[:][1], logits(10).log_softmax(-1).topk(4).values)


def test_a_killed_writer_leaves_an_incomplete_cache_that_can_be_resumed(tmp_path):
    with pytest.raises(RuntimeError, match="boom"):
        with TeacherCache(tmp_path / "c", "w", top_k=4, vocab_size=9, shard_rows=4) as cache:
            cache.append(logits(10))
            raise RuntimeError("boom")
    with pytest.raises(ValueError, match="incomplete: its writer stopped after 8 rows; open it with mode 'a'"):
        TeacherCache(tmp_path / "c")
    (tmp_path / "c" / ".shard-00002.safetensors.99.part").write_bytes(b"half")
    with TeacherCache(tmp_path / "c", "a") as cache:
        cache.append(logits(10)[len(cache):])
    assert torch.equal(TeacherCache(tmp_path / "c")[:][0], logits(10).log_softmax(-1).topk(4).indices)


def test_a_writer_that_fails_in_the_middle_of_a_file_leaves_the_old_state(tmp_path, monkeypatch):
    import kdbook.big_vocab as module
    cache = TeacherCache(tmp_path / "c", "w", top_k=4, vocab_size=9, shard_rows=4)
    cache.append(logits(4))
    before = sorted(path.name for path in (tmp_path / "c").iterdir())

    def no_space(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(module.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        cache.append(logits(4))
    monkeypatch.undo()
    assert [name for name in sorted(path.name for path in (tmp_path / "c").iterdir()) if not name.endswith(".part")] == before
    with TeacherCache(tmp_path / "c", "a") as resumed:
        assert len(resumed) == 4


def test_missing_truncated_and_foreign_shards_are_named(tmp_path):
    from safetensors.torch import save_file
    for name, damage, message in [
        ("missing", lambda path: path.unlink(), "shard-00001.safetensors is missing"),
        ("truncated", lambda path: path.write_bytes(path.read_bytes()[:-5]), "shard-00001.safetensors is damaged"),
        ("header", lambda path: path.write_bytes(path.read_bytes()[:20]), "shard-00001.safetensors is damaged"),
        ("empty", lambda path: path.write_bytes(b""), "shard-00001.safetensors is damaged"),
        ("garbage", lambda path: path.write_bytes(b"\xff" * 500), "shard-00001.safetensors is damaged"),
        ("foreign", lambda path: save_file({"weights": torch.zeros(3)}, path), "shard-00001.safetensors is damaged"),
        ("other rows", lambda path: save_file({"indices": torch.zeros(3, 4), "logprobs": torch.zeros(3, 4)}, path), r"must hold 4 rows of 4, got \(3, 4\)"),
    ]:
        folder = write(tmp_path / name)
        damage(folder / "shard-00001.safetensors")
        with pytest.raises(ValueError, match=message):
            TeacherCache(folder)
        if name != "other rows":
            with pytest.raises(ValueError, match=message):
                TeacherCache(folder, "a")


def test_missing_and_damaged_index(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no teacher cache in"):
        TeacherCache(tmp_path / "nowhere")
    folder = write(tmp_path / "c")
    content = (folder / "index.json").read_text()
    for text, message in ((content[:-20], "index.json is damaged"), ("[]", "not the index of a teacher cache"), (content.replace("version 1", "version 9"), "not the index")):
        (folder / "index.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            TeacherCache(folder)


def test_modes_and_arguments(tmp_path):
    folder = write(tmp_path / "c", source="teacher A")
    with pytest.raises(FileExistsError, match="there is a teacher cache in"):
        TeacherCache(folder, "w", top_k=2, vocab_size=9)
    with pytest.raises(ValueError, match="made from 'teacher A', got 'teacher B'"):
        TeacherCache(folder, source="teacher B")
    assert TeacherCache(folder).source == "teacher A"
    for options, message in (({}, "mode 'w' needs"), (dict(top_k=10, vocab_size=9), "got 10 and 9"), (dict(top_k=2, vocab_size=9, dtype="int8"), "dtype must be one of"),
                             (dict(top_k=2, vocab_size=9, shard_rows=0), "shard_rows must be at least 1, got 0")):
        with pytest.raises(ValueError, match=message):
            TeacherCache(tmp_path / "new", "w", **options)
    with pytest.raises(ValueError, match="mode must be one of 'r', 'w', 'a', got 'x'"):
        TeacherCache(folder, "x")
    reader = TeacherCache(folder)
    with pytest.raises(ValueError, match="open for reading"):
        reader.append(logits(2))
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="is closed"):
        reader[0]
    with TeacherCache(folder, "a") as writer:
        with pytest.raises(ValueError, match="open for writing"):
            writer[0]
        for bad, message in ((torch.zeros(2, 8), r"teacher_logits must have shape \(..., 9\), got \(2, 8\)"), (torch.full((1, 9), math.nan), "must be log-probabilities")):
            with pytest.raises(ValueError, match=message):
                writer.append(bad)
        with pytest.raises(ValueError, match=r"indices must have shape \(..., 4\), got \(1, 3\)"):
            writer.append_top_k(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3))
        with pytest.raises(ValueError, match=r"indices must be -100 or in \[0, 9\), got 9"):
            writer.append_top_k(torch.tensor([[0, 1, 2, 9]]), torch.full((1, 4), -2.0))
        with pytest.raises(ValueError, match="must be log-probabilities whose exp sums to at most 1"):
            writer.append_top_k(torch.tensor([[0, 1, 2, 3]]), torch.full((1, 4), 2.0))
    with pytest.raises(ValueError, match="is closed"):
        writer.append(logits(1))
    assert len(TeacherCache(folder)) == 10


# ---------------------------------------------------------------- top-k losses
def top(teacher, k):
    values = teacher.log_softmax(-1).topk(k)
    return values.indices, values.values


@quick
@given(st.integers(0, 1000), st.integers(1, 6), st.sampled_from([(), (3,), (2, 3)]))
def test_tails_against_their_definition(seed, k, shape):
    student, teacher = torch.randn(2, *shape, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    indices, logprobs = top(teacher, k)
    p, q = teacher.softmax(-1).gather(-1, indices), student.softmax(-1).gather(-1, indices)
    kl = lambda a, b: (a * (a / b).log()).sum(-1)
    mass, rest = p.sum(-1, keepdim=True), 1 - p.sum(-1, keepdim=True)
    renormalised = topk_loss(student, indices, logprobs, tail="renormalise", reduction="none")
    bucket = topk_loss(student, indices, logprobs, tail="bucket", reduction="none")
    assert torch.allclose(renormalised, kl(p / mass, q))
    assert torch.allclose(bucket, kl(torch.cat([p, rest], -1), torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)))
    assert (bucket <= forward_kl(student, teacher, reduction="none") + 1e-12).all() and (bucket >= -1e-12).all()
    assert torch.isclose(topk_loss(student, indices, logprobs, tail="bucket"), bucket.mean())


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_all_classes_known_is_the_full_kl(tail):
    student, teacher = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.isclose(topk_loss(student, *top(teacher, 6), tail=tail), forward_kl(student, teacher))
    student.requires_grad_()
    topk_loss(student, *top(teacher, 6), tail=tail).backward()
    assert torch.allclose(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / 4, atol=1e-6)


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_topk_gradients(tail):
    student, teacher = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    indices, logprobs = top(teacher, 2)
    assert gradcheck(lambda z: topk_loss(z, indices, logprobs, tail=tail), (student.requires_grad_(),))
    gradient, = torch.autograd.grad(topk_loss(student, indices, logprobs, tail=tail, reduction="none").sum(), student)
    q, listed = student.softmax(-1).detach(), torch.zeros(3, 6, dtype=torch.bool).scatter(-1, indices, True)
    p, mass = teacher.softmax(-1), logprobs.exp().sum(-1, keepdim=True)
    if tail == "renormalise":
        expected = torch.where(listed, q - p / mass, q)
    else:
        expected = torch.where(listed, q - p, q * (1 - (1 - mass) / torch.where(listed, 0, q).sum(-1, keepdim=True)))
    assert torch.allclose(gradient, expected)


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_masks_missing_entries_and_garbage(tail):
    student, teacher = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2))
    indices, logprobs = top(teacher, 3)
    expected = topk_loss(student[:2], indices[:2], logprobs[:2], tail=tail)
    mask = torch.tensor([True, True, False, True])
    indices, logprobs, garbage = indices.clone(), logprobs.clone(), student.clone()
    indices[3], logprobs[2:], garbage[2:] = -100, math.nan, math.inf
    indices[2, 0] = 17  # nobody looks at a masked position
    garbage.requires_grad_()
    value = topk_loss(garbage, indices, logprobs, tail=tail, mask=mask)
    value.backward()
    assert torch.isclose(value, expected) and torch.isfinite(garbage.grad).all() and not garbage.grad[2:].any()
    assert topk_loss(garbage, indices, logprobs, tail=tail, mask=mask, reduction="none")[2:].tolist() == [0, 0]
    nothing = torch.full_like(indices, -100)
    assert topk_loss(student, nothing, logprobs, tail=tail) == 0
    with pytest.raises(ValueError, match="nothing counts"):
        topk_loss(student, nothing, logprobs, tail=tail, empty="error")
    ragged, full = torch.tensor([[4, 0, -100]]), torch.tensor([[0.6, 0.3, 0.9]]).log()
    short = topk_loss(student[:1], ragged[:, :2], full[:, :2], tail=tail)
    assert torch.isclose(topk_loss(student[:1], ragged, full, tail=tail), short)
    assert torch.isclose(topk_loss(student[:1], ragged.flip(-1), full.flip(-1), tail=tail), short)


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_a_student_sure_of_the_top_keeps_finite_gradients(tail):
    student = torch.tensor([[200.0, 0.0, 0.0, 0.0]], requires_grad=True)  # its tail mass is 0 in float32
    for logprobs in (torch.tensor([[0.0]]), torch.tensor([[0.9]]).log()):
        student.grad = None
        value = topk_loss(student, torch.tensor([[0]]), logprobs, tail=tail)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(student.grad).all()


def test_half_precision_students():
    student, teacher = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(3))
    for tail in ("renormalise", "bucket"):
        value = topk_loss(student.bfloat16(), *top(teacher, 8), tail=tail)
        assert value.dtype == torch.float32 and math.isclose(value, topk_loss(student.bfloat16().double(), *top(teacher, 8), tail=tail), rel_tol=1e-4)


@pytest.mark.parametrize("change, message", [
    (dict(tail="ignore"), "tail must be one of 'renormalise', 'bucket', got 'ignore'"),
    (dict(indices=torch.zeros(3, 2, dtype=torch.int64)), r"indices must have shape \(2,\) and k, got \(3, 2\)"),
    (dict(indices=torch.zeros(2, dtype=torch.int64)), r"indices must have shape \(2,\) and k, got \(2,\)"),
    (dict(indices=torch.tensor([[0, 5], [0, 1]])), r"indices must be -100 or in \[0, 5\), got 5"),
    (dict(logprobs=torch.zeros(2, 3)), r"logprobs must have shape \(2, 2\), got \(2, 3\)"),
    (dict(logprobs=torch.ones(2, 2)), r"logprobs must be log-probabilities whose exp sums to at most 1, got a row with 5.437"),
    (dict(mask=torch.ones(2)), r"mask must be a bool tensor of shape \(2,\), got torch.float32"),
    (dict(reduction="sum"), "reduction must be one of 'mean', 'none', got 'sum'"),
])
def test_bad_arguments_of_the_topk_loss_are_named(change, message):
    arguments = dict(student_logits=torch.zeros(2, 5), indices=torch.tensor([[0, 1], [3, 4]]), logprobs=torch.full((2, 2), 0.4).log(), tail="bucket") | change
    with pytest.raises(ValueError, match=message):
        topk_loss(**arguments)
