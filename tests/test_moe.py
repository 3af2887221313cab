import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdbook.moe import apply_experts, load_balance, route

seeds = st.integers(0, 10_000)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.booleans(), seeds)
def test_route(tokens, count, k, forces, normalize, seed):
    k = min(k, count)
    logits = normal(tokens, count, seed=seed)
    forced = torch.randint(count, (tokens,), generator=torch.Generator().manual_seed(seed)) if forces else None
    weights, experts, probabilities = route(logits, k, forced=forced, normalize=normalize)
    assert weights.shape == experts.shape == (tokens, k) and experts.dtype == torch.int64
    assert torch.allclose(probabilities, logits.softmax(-1))
    for row in range(tokens):
        best = logits[row].argsort(descending=True, stable=True)[:k].tolist()
        if forces and forced[row] not in best:
            best[-1] = int(forced[row])
        assert experts[row].tolist() == best and len(set(best)) == k
        chosen = probabilities[row, best]
        assert torch.allclose(weights[row], chosen / chosen.sum() if normalize else chosen)
        assert (weights[row].diff() <= 0).all()  # best first, also with a forced expert


def test_route_ties_dtypes_and_no_side_effect():
    logits = torch.zeros(2, 5)
    assert route(logits, 3)[1].tolist() == [[0, 1, 2]] * 2
    forced = torch.tensor([4, 1])
    assert route(logits, 3, forced=forced)[1].tolist() == [[0, 1, 4], [0, 1, 2]] and forced.tolist() == [4, 1]
    assert route(logits.bfloat16(), 1)[2].dtype == torch.float32 and route(logits.double(), 1)[2].dtype == torch.float64


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 6), st.integers(1, 5), st.integers(1, 3), seeds)
def test_apply_experts_equals_the_loop_over_tokens(tokens, count, k, seed):
    k, x = min(k, count), normal(tokens, 4, seed=seed)
    torch.manual_seed(seed)
    modules = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))
    weights, experts, _ = route(normal(tokens, count, seed=seed + 1), k)
    result = apply_experts(x, weights, experts, modules)
    assert result.shape == (tokens, 4)
    for i in range(tokens):
        assert torch.allclose(result[i], sum(w * modules[e](x[i]) for w, e in zip(weights[i], experts[i].tolist())), atol=1e-5)


def test_each_expert_runs_once_on_its_own_tokens():
    calls = []

    def expert(number):
        def run(rows):
            calls.append((number, len(rows)))
            return rows
        return run

    apply_experts(torch.ones(3, 2), torch.ones(3, 2), torch.tensor([[0, 1], [1, 0], [1, 3]]), [expert(e) for e in range(4)])
    assert calls == [(0, 2), (1, 3), (2, 0), (3, 1)]


def test_gradients_reach_router_and_experts_exactly():
    torch.manual_seed(0)
    modules = nn.ModuleList(nn.Linear(3, 3).double() for _ in range(4))
    x, logits = normal(5, 3).double().requires_grad_(), normal(5, 4, seed=1).double().requires_grad_()

    def layer(x, logits):
        weights, experts, _ = route(logits, 2, normalize=True)
        return apply_experts(x, weights, experts, modules)

    assert torch.autograd.gradcheck(layer, (x, logits))
    apply_experts(x, torch.ones(5, 1), torch.zeros(5, 1, dtype=torch.int64), modules).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in modules[3].parameters())


def test_half_precision_stays_half():
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    weights, experts, _ = route(torch.zeros(2, 2, dtype=torch.bfloat16), 1)
    assert apply_experts(x, weights, experts, [lambda rows: rows] * 2).dtype == torch.bfloat16


def test_upcycled_layer_is_the_dense_layer_where_weights_are_normalised():
    torch.manual_seed(0)
    dense, x, logits = nn.Linear(6, 6), normal(7, 6), normal(7, 4, seed=1)
    for normalize in (True, False):
        weights, experts, _ = route(logits, 2, normalize=normalize)
        scale = 1 if normalize else weights.sum(1, keepdim=True)
        assert torch.allclose(apply_experts(x, weights, experts, [dense] * 4), scale * dense(x), atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 3), seeds)
def test_load_balance_by_its_definition(tokens, count, k, seed):
    k = min(k, count)
    _, experts, probabilities = route(normal(tokens, count, seed=seed), k)
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0] = True
    for m in (None, mask):
        p, e = (probabilities, experts) if m is None else (probabilities[m], experts[m])
        expected = count * sum((e[:, s] == i).float().mean() * p[:, i].mean() for s in range(k) for i in range(count))
        assert load_balance(probabilities, experts, m).item() == pytest.approx(expected.item(), rel=1e-5)
    assert load_balance(probabilities, experts) <= count * k + 1e-5


def test_load_balance_is_k_for_even_use_and_pushes_against_the_busy_expert():
    _, experts, probabilities = route(torch.eye(4) * 3, 1)
    assert load_balance(probabilities, experts).item() == pytest.approx(1)
    logits = torch.tensor([[1.0, 0.0], [2.0, 0.0]], requires_grad=True)
    _, experts, probabilities = route(logits, 1)
    load_balance(probabilities, experts).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1] < 0).all()


def test_golden_numbers(shared):
    def decode(value):
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"])) if isinstance(value, dict) else value

    def mixture_of_experts(x, gate_weight, w_gate, w_up, w_down, language_ids=None, k=2, normalize=False):
        weights, experts, _ = route(x @ gate_weight.T, k, forced=language_ids, normalize=normalize)
        return apply_experts(x, weights, experts, [lambda h, e=e: (F.silu(h @ w_gate[e].T) * (h @ w_up[e].T)) @ w_down[e].T for e in range(len(w_gate))])

    def load_balancing_loss(logits, k=2, mask=None):
        _, experts, probabilities = route(logits, k)
        return load_balance(probabilities, experts, mask)

    def top_k_gate(logits, top_k=2):
        weights, experts, probabilities = route(logits, top_k, normalize=True)
        return torch.zeros_like(probabilities).scatter(1, experts, weights), load_balance(probabilities, experts[:, :1])

    functions = {"hybrid_routing": lambda logits, ids=None, k=2: route(logits, k, forced=ids)[:2], "mixture_of_experts": mixture_of_experts,
                 "load_balancing_loss": load_balancing_loss, "top_k_gate": top_k_gate}
    seen = set()
    for file in ("multilingual/apollo_moe", "multimodal/llava_mod"):
        for case in json.loads((shared / f"golden/{file}.json").read_text())["cases"]:
            name = case["call"].rsplit(".", 1)[1]
            if name in functions:
                got = functions[name](*map(decode, case["args"]), **{key: decode(value) for key, value in case["kwargs"].items()})
                want = case["expect"] if isinstance(case["expect"], list) else [case["expect"]]
                for one, other in zip(got if isinstance(got, tuple) else [got], want):
                    assert torch.allclose(one.double(), torch.as_tensor(decode(other)).double(), rtol=1e-4, atol=1e-5)
                seen.add(name)
    assert seen == set(functions)


@pytest.mark.parametrize("call, words", [
    (lambda: route(torch.zeros(3), 1), r"router_logits must be \(N, n\)"),
    (lambda: route(torch.zeros(2, 3), 0), "k must be between 1 and the 3 experts, got 0"),
    (lambda: route(torch.zeros(2, 3), 4), "k must be between 1 and the 3 experts, got 4"),
    (lambda: route(torch.zeros(2, 3), 1, forced=torch.tensor([0])), "forced must be"),
    (lambda: route(torch.zeros(2, 3), 1, forced=torch.tensor([0, 3])), r"forced must be in \[0, 3\), got 0 to 3"),
    (lambda: route(torch.full((1, 2), float("nan")), 1), "nan"),
    (lambda: apply_experts(torch.zeros(2, 3), torch.ones(2, 1), torch.zeros(2, 2, dtype=torch.int64), [nn.Identity()]), "weights and experts"),
    (lambda: apply_experts(torch.zeros(3, 3), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), [nn.Identity()]), "N = 3"),
    (lambda: apply_experts(torch.zeros(1, 3), torch.ones(1, 1), torch.tensor([[1]]), [nn.Identity()]), r"experts must be in \[0, 1\)"),
    (lambda: apply_experts(torch.zeros(0, 3), torch.ones(0, 1), torch.zeros(0, 1, dtype=torch.int64), []), "modules must hold"),
    (lambda: load_balance(torch.ones(2, 2), torch.zeros(3, 1, dtype=torch.int64)), "probabilities and experts"),
    (lambda: load_balance(torch.ones(2, 2), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2)), "mask must be bool"),
    (lambda: load_balance(torch.ones(2, 2), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)), "nothing counts"),
    (lambda: load_balance(torch.ones(0, 2), torch.zeros(0, 1, dtype=torch.int64)), "nothing counts"),
])
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
