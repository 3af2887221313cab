"""fit against a loop written by hand, resuming, measuring, accelerate in several processes, and every refusal."""
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from kdbook.training import (History, batches, choose_device, evaluation_mode, fingerprint, fit, learning_rate_factor, predict, seed_everything, stage_index,
                             teacher_outputs, unrolled_sgd)


def model(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 3))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(120, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("schedule, warmup, accumulate, clip", [("cosine", 5, 1, 1.0), ("linear", 0, 3, 0.1), ("constant", 2, 2, None)])
def test_fit_is_the_loop_one_would_write(data, schedule, warmup, accumulate, clip):
    steps = 20
    stream = batches(data, 8, steps=steps * accumulate, seed=3)
    ours, by_hand = model(), model()
    history = fit(ours, stream, loss, steps=steps, lr=0.02, weight_decay=0.1, warmup=warmup, schedule=schedule, accumulate=accumulate, clip=clip)
    optimiser = torch.optim.AdamW(by_hand.parameters(), lr=0.02, weight_decay=0.1)
    source = iter(stream)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.02 * learning_rate_factor(step, steps=steps, warmup=warmup, schedule=schedule)
        optimiser.zero_grad()
        values = [loss(by_hand, next(source)) for _ in range(accumulate)]
        for value in values:
            (value / accumulate).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(by_hand.parameters(), clip)
        optimiser.step()
        assert math.isclose(history[step]["loss"], torch.stack(values).mean().item(), rel_tol=1e-5)
    assert torch.allclose(weights(ours), weights(by_hand), atol=1e-6)
    assert [row["step"] for row in history] == list(range(1, steps + 1))


def test_a_dict_is_summed_or_its_total_is_optimised(data):
    stream = batches(data, 8, steps=10)

    def parts(model, batch):
        return {"ce": loss(model, batch), "size": 0.01 * model[0].weight.square().sum()}

    def with_total(model, batch):
        values = parts(model, batch)
        return {**values, "total": values["ce"] + values["size"], "only logged": torch.tensor(7.0)}

    a, b = model(), model()
    first, second = fit(a, stream, parts, steps=10), fit(b, stream, with_total, steps=10)
    assert torch.equal(weights(a), weights(b))
    assert first[-1]["loss"] == second[-1]["loss"] and second[-1]["only logged"] == 7 and "total" not in second[-1]
    assert math.isclose(first[0]["loss"], first[0]["ce"] + first[0]["size"], rel_tol=1e-6)


def test_measuring_changes_nothing_even_with_dropout(data):
    stream = batches(data, 8, steps=12)

    def evaluate(model):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3), np.random.rand(), model(data[0])
        return {"accuracy": 0.5}

    a, b = model(dropout=0.5), model(dropout=0.5)
    torch.manual_seed(0)
    history = fit(a, stream, loss, steps=12, evaluate=evaluate, evaluate_every=5)
    torch.manual_seed(0)
    fit(b, stream, loss, steps=12)
    assert torch.equal(weights(a), weights(b))
    assert [row["step"] for row in history if "accuracy" in row] == [5, 10, 12]
    assert history.frame()["accuracy"].notna().sum() == 3 and list(history.series("accuracy")[0]) == [5, 10, 12]
    with pytest.raises(KeyError, match="was not logged; there are"):
        history.series("acc")


@pytest.mark.parametrize("stop", [7, 10, 13])
def test_resuming_from_a_checkpoint_is_exact(data, tmp_path, stop):
    class Counter:
        calls = 0
        def state_dict(self): return {"calls": self.calls}
        def load_state_dict(self, state): self.calls = state["calls"]

    def train(net, counter, path, until):
        def stopping(model, batch):
            if counter.calls == until:
                raise KeyboardInterrupt
            counter.calls += 1
            return {"total": loss(model, batch), "calls": torch.tensor(float(counter.calls))}
        return fit(net, batches(data, 8, steps=20, seed=2, replace=False), stopping, steps=20, lr=0.01, checkpoint=path, checkpoint_every=5, stateful={"counter": counter})

    torch.manual_seed(5)
    whole = model(dropout=0.3)
    torch.manual_seed(9)
    expected = train(whole, Counter(), tmp_path / "whole.pt", None)
    broken = model(dropout=0.3)
    torch.manual_seed(5)
    broken = model(dropout=0.3)
    torch.manual_seed(9)
    with pytest.raises(KeyboardInterrupt):
        train(broken, Counter(), tmp_path / "run.pt", stop)
    resumed, counter = model(seed=77, dropout=0.3), Counter()
    torch.manual_seed(12345)
    again = train(resumed, counter, tmp_path / "run.pt", None)
    assert torch.equal(weights(whole), weights(resumed)) and [dict(r) for r in again] == [dict(r) for r in expected] and counter.calls == 20
    assert train(model(), Counter(), tmp_path / "run.pt", None)[-1] == expected[-1], "a finished run is only read"


def test_checkpoints_that_do_not_fit_are_refused(data, tmp_path):
    path, stream = tmp_path / "c.pt", batches(data, 8, steps=4)
    fit(model(), stream, loss, steps=4, checkpoint=path)
    with pytest.raises(ValueError, match="run of 4 steps, not 5"):
        fit(model(), stream, loss, steps=5, checkpoint=path)
    with pytest.raises(ValueError, match="another model"):
        fit(nn.Linear(4, 3), stream, loss, steps=4, checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        fit(model(), stream, loss, steps=4, checkpoint=path)


def test_a_loss_that_is_not_finite_stops_the_run(data):
    def breaking(model, batch):
        breaking.calls += 1
        value = loss(model, batch)
        return {"ce": value, "bad": value * (float("nan") if breaking.calls == 4 else 0)}
    breaking.calls = 0
    with pytest.raises(FloatingPointError, match="not finite at step 4: .*bad = nan"):
        fit(model(), batches(data, 8, steps=9), breaking, steps=9)


@pytest.mark.parametrize("options, message", [({"steps": 0}, "steps and accumulate"), ({"accumulate": 0}, "steps and accumulate"), ({"lr": -0.1}, "lr must be"), ({"lr": float("nan")}, "lr must be"),
                                              ({"warmup": 11}, "warmup must be between 0 and steps = 10, got 11"), ({"schedule": "cosin"}, "one of cosine, linear, constant")])
def test_bad_arguments_are_named_before_training(data, options, message):
    net = model()
    before = weights(net).clone()
    with pytest.raises(ValueError, match=message):
        fit(net, batches(data, 8, steps=10), loss, **{"steps": 10, **options})
    assert torch.equal(before, weights(net))
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="require a gradient"):
        fit(net, batches(data, 8, steps=10), loss, steps=10)


def test_batches_that_end_and_lists_that_start_over(data):
    with pytest.raises(ValueError, match="ended after 3"):
        fit(model(), ((data[0][:8], data[1][:8]) for _ in range(3)), loss, steps=5)
    with pytest.raises(ValueError, match="ended after 0"):
        fit(model(), [], loss, steps=5)
    assert len(fit(model(), [(data[0][:8], data[1][:8])] * 2, loss, steps=5)) == 5


def test_frozen_parts_and_own_optimisers(data):
    net = model()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    history = fit(net, batches(data, 8, steps=5), loss, steps=5, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    assert torch.equal(before, net[0].weight) and history[0]["lr"] == 0.5 and net.training


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 30), st.booleans(), st.integers(0, 5))
@settings(max_examples=60)
def test_batches_are_deterministic_and_cover_epochs(rows, size, steps, replace, start):
    if not replace and size > rows:
        with pytest.raises(ValueError, match="batch_size must be between 1 and the"):
            batches(torch.arange(rows), size, steps=steps, replace=replace)
        return
    made = batches((torch.arange(rows), torch.arange(rows) * 2), size, steps=steps, seed=4, replace=replace)
    first = [a.tolist() for a, b in made]
    assert first == [a.tolist() for a, _ in made] and len(first) == len(made) == steps
    assert first[start:] == [a.tolist() for a, _ in made.starting_at(start)]
    assert all(torch.equal(a * 2, b) and len(a) == size for a, b in made)
    if not replace:
        epoch = rows // size
        for i in range(0, steps - epoch + 1, epoch):
            seen = sum(first[i:i + epoch], [])
            assert len(set(seen)) == len(seen)
    shorter = [a.tolist() for a, _ in batches((torch.arange(rows), torch.arange(rows)), size, steps=max(1, steps // 2), seed=4, replace=replace)]
    assert first[:len(shorter)] == shorter


def test_batches_refuse_what_cannot_be_drawn():
    for tensors in ((torch.zeros(3), torch.zeros(4)), torch.zeros(0), {"a": torch.zeros(2), "b": torch.zeros(1)}):
        with pytest.raises(ValueError, match="common first dimension"):
            batches(tensors, 1, steps=1)
    assert set(next(iter(batches({"a": torch.zeros(2), "b": torch.ones(2)}, 1, steps=1)))) == {"a", "b"}


def test_predicting_in_any_batch_size_and_leaving_the_mode(data):
    net = model(dropout=0.5).train()
    whole = predict(net, data[0])
    assert torch.allclose(whole, predict(net, data[0], batch_size=7), atol=1e-6) and net.training and not whole.requires_grad
    assert torch.equal(predict(net, {"input": data[0]}), whole)
    assert torch.allclose(predict(net, data[0], forward=lambda m, x: (m(x) * 2, "rest")), whole * 2)
    with pytest.raises(ValueError, match="at least one row"):
        predict(net, data[0][:0])


def test_teacher_outputs_are_cached_by_content(data, tmp_path):
    net, path = model(), tmp_path / "deep" / "t.safetensors"
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    first = teacher_outputs(net, data[0], cache=path)
    count = len(calls)
    assert torch.equal(first, teacher_outputs(net, data[0], cache=path)) and len(calls) == count
    assert not torch.equal(first, teacher_outputs(net, data[0] + 1, cache=path)) and len(calls) > count
    assert [p.name for p in path.parent.iterdir()] == ["t.safetensors"]
    assert fingerprint(torch.zeros(2)) != fingerprint(torch.zeros(2, 1)) != fingerprint(torch.zeros(2, 1, dtype=torch.float64)) and fingerprint(1) != fingerprint("1")


def test_unrolled_sgd_gives_the_meta_gradient():
    start = torch.tensor([1.5, -0.5], dtype=torch.float64, requires_grad=True)

    def final(start):
        *_, end = unrolled_sgd({"w": start}, lambda p: (p["w"] ** 4).sum(), lr=0.05, steps=3, momentum=0.9, create_graph=True)
        return end["w"].sum()

    assert torch.autograd.gradcheck(final, (start,))
    *_, plain = unrolled_sgd({"w": start}, lambda p: (p["w"] ** 4).sum(), lr=0.05, steps=3, momentum=0.9)
    assert torch.allclose(plain["w"].sum(), final(start)) and plain["w"].is_leaf
    reference = torch.nn.Parameter(start.detach().clone())
    optimiser = torch.optim.SGD([reference], lr=0.05, momentum=0.9)
    for _ in range(3):
        optimiser.zero_grad()
        (reference ** 4).sum().backward()
        optimiser.step()
    assert torch.allclose(reference, plain["w"])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        next(unrolled_sgd({"w": start}, lambda p: p["w"].sum(), lr=1.0, steps=0))


def test_stage_index_and_rates():
    assert [stage_index(n, [3, 2]) for n in range(6)] == [0, 0, 0, 1, 1, 2] and stage_index(0, []) == 0
    with pytest.raises(ValueError, match="must not be negative"):
        stage_index(-1, [2])
    assert learning_rate_factor(10, steps=10) == 0 and learning_rate_factor(99, steps=10, schedule="linear") == 0


def test_devices_and_seeds():
    assert choose_device("cpu").type == "cpu" and choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="device must be one of .*cpu.* got 'cuda:55'"):
        choose_device("cuda:55")
    with pytest.raises(ValueError, match="seed must be between"):
        seed_everything(-1)
    with evaluation_mode(model()) as net:
        assert not net.training
    assert isinstance(History(), list)


PROGRAM = """
import json, sys, torch, torch.nn.functional as F
from torch import nn
from kdbook.training import batches, fit
from accelerate import PartialState
torch.manual_seed(0)
net = nn.Linear(4, 3)
x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
fit(net, batches((x, (x[:, 0] > 0).long()), 8, steps=15, seed=2), lambda m, b: F.cross_entropy(m(b[0]), b[1]), steps=15, lr=0.05, clip=1.0, device="cpu")
if PartialState().process_index == 0:
    json.dump([PartialState().num_processes, *torch.cat([p.detach().flatten() for p in net.parameters()]).tolist()], open(sys.argv[1], "w"))
"""


def test_two_processes_train_the_same_model_as_one(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    one = subprocess.run([sys.executable, "program.py", "one.json"], cwd=tmp_path, env=env, capture_output=True, text=True)
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "program.py", "two.json"], cwd=tmp_path, env=env,
                         capture_output=True, text=True)
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    first, second = json.loads((tmp_path / "one.json").read_text()), json.loads((tmp_path / "two.json").read_text())
    assert (first[0], second[0]) == (1, 2) and np.allclose(first[1:], second[1:], atol=1e-5)
