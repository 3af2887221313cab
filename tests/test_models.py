"""kdbook.models: builders, counts, students made from teachers, capture, pooling, loading."""
import copy
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from kdbook import models as M

IDS = torch.randint(4, 40, (2, 6), generator=torch.Generator().manual_seed(0))
PICTURES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BUILDERS = {
    "decoder": lambda **k: M.decoder(40, width=16, heads=2, max_length=8, **k),
    "encoder": lambda **k: M.encoder(40, width=16, heads=2, max_length=8, **k),
    "body": lambda **k: M.encoder(40, width=16, heads=2, max_length=8, head=None, **k),
    "encoder_decoder": lambda **k: M.encoder_decoder(40, width=16, heads=2, max_length=8, **k),
    "t5": lambda **k: M.t5(40, width=16, heads=2, **k),
    "moe": lambda **k: M.moe_decoder(40, width=16, heads=2, experts=3, max_length=8, **k),
    "vit": lambda **k: M.vit(8, 4, num_classes=3, width=16, heads=2, **k),
    "vit_mae": lambda **k: M.vit_mae(8, 2, width=16, heads=2, decoder_width=8, **k),
    "conv": lambda **k: M.SmallConvNet(3, channels=3, **k),
    "resnet": lambda **k: M.small_resnet(3, widths=(4, 8), **k),
    "gru": lambda **k: M.GRUDecoder(40, width=8, embedding=4, **k),
    "mlp": lambda **k: M.mlp([4, 8, 2], **k),
}


def outputs(name, model):
    """The logits, or the last states, of a model on the fixed inputs."""
    if name in ("encoder_decoder", "t5"):
        return model(input_ids=IDS, decoder_input_ids=IDS[:, :3]).logits
    if name == "vit_mae":
        return model(PICTURES, noise=torch.arange(32.0).view(2, 16)).logits
    if name in ("vit", "conv", "resnet"):
        out = model(PICTURES)
        return out[0] if isinstance(out, tuple) else out.logits
    if name == "gru":
        return model(IDS, torch.ones(2, 8))[0]
    if name == "mlp":
        return model(torch.ones(2, 4))
    out = model(IDS)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("name", BUILDERS)
def test_seed_decides_and_leaves_the_global_stream_alone(name):
    build = BUILDERS[name]
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, second, other = build(seed=3), build(seed=3), build(seed=4)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))
    torch.manual_seed(1)
    unseeded = build()
    assert not torch.equal(state, torch.random.get_rng_state())  # None: the global stream decides
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(unseeded.parameters(), build().parameters()))


@pytest.mark.parametrize("name", BUILDERS)
def test_forward_is_quiet_deterministic_and_differentiable(name, caplog):
    model = BUILDERS[name](seed=0).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = outputs(name, model)
        out.sum().backward()
    if name not in ("conv", "resnet"):
        assert torch.equal(out, outputs(name, model))  # no dropout in training mode
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert torch.isfinite(out).all()


def test_dropout_is_there_when_asked_for():
    model = M.decoder(40, width=16, heads=2, dropout=0.5, seed=0).train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    assert torch.equal(model.eval()(IDS).logits, model(IDS).logits)


def test_initial_scale_keeps_logits_of_the_same_size_at_every_width():
    sizes = [M.decoder(100, width=d, heads=4, seed=0)(IDS).logits.std().item() for d in (16, 64, 256)]
    assert max(sizes) / min(sizes) < 1.5
    assert M.decoder(40, width=768, layers=1, seed=0).transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert M.decoder(40, width=64, init_std=0.3, seed=0).transformer.wte.weight.std().item() == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("build, message", [
    (lambda: M.decoder(40, width=18, heads=4), "width must be a multiple of heads, got width 18 and 4 heads"),
    (lambda: M.decoder(0), "vocab_size must be a whole number >= 1, got 0"),
    (lambda: M.decoder(40, layers=1.5), "layers must be a whole number >= 1, got 1.5"),
    (lambda: M.encoder(40, head="pos"), "head must be one of"),
    (lambda: M.encoder(40, head="classification"), "num_labels must be given for the heads"),
    (lambda: M.encoder(40, head=None, num_labels=2), "num_labels must be given for the heads"),
    (lambda: M.encoder_decoder(40, decoder_layers=0), "decoder_layers must be a whole number"),
    (lambda: M.moe_decoder(40, experts=2, active=3), "active must be at most experts, got 3 of 2"),
    (lambda: M.vit(9, 4, num_classes=2), "image_size must be a multiple of patch_size, got 9 and 4"),
    (lambda: M.vit_mae(8, 2, mask_ratio=1.0), "mask_ratio in (0, 1)"),
    (lambda: M.vit_mae(8, 2, width=6, heads=2), "multiples of 4"),
    (lambda: M.mlp([3]), "widths must be at least two numbers"),
    (lambda: M.mlp([3, 2], activation="swish"), "activation must be one of"),
    (lambda: M.SmallConvNet(2, image_size=8, widths=(4, 4, 4, 4)), "leave a pixel of 8 x 8"),
    (lambda: M.SmallConvNet(2, norm="layer"), "norm must be"),
    (lambda: M.layer_map(3, 2), "num_student must be between 1 and the teacher's 2 layers, got 3"),
    (lambda: M.layer_map(1, 2, "first"), "strategy must be 'skip' or 'last', got 'first'"),
])
def test_bad_sizes_are_refused_by_name(build, message):
    with pytest.raises(ValueError) as error:
        build()
    assert message in str(error.value)


# ---- encoder details -------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pad_id", [0, 1, 5])
def test_encoder_reaches_its_full_length_for_any_padding_id(pad_id):
    model = M.encoder(40, width=16, heads=2, max_length=6, pad_id=pad_id, seed=0)
    assert model(IDS + 2).logits.shape == (2, 6, 40)


@pytest.mark.parametrize("head, kwargs, shapes", [("mlm", {}, {"logits": (2, 6, 40)}), ("classification", {"num_labels": 3}, {"logits": (2, 3)}),
                                                  ("tokens", {"num_labels": 5}, {"logits": (2, 6, 5)}),
                                                  ("spans", {}, {"start_logits": (2, 6), "end_logits": (2, 6)}), (None, {}, {"last_hidden_state": (2, 6, 16)})])
def test_encoder_heads(head, kwargs, shapes):
    out = M.encoder(40, width=16, heads=2, head=head, seed=0, **kwargs)(IDS)
    assert {name: tuple(out[name].shape) for name in shapes} == shapes
    assert "pooler_output" not in out


def test_eager_and_fused_attention_agree():
    for build in (BUILDERS["decoder"], BUILDERS["encoder"], BUILDERS["encoder_decoder"]):
        name = next(n for n, b in BUILDERS.items() if b is build)
        fused, eager = build(seed=0), build(seed=0, attention="eager")
        assert torch.allclose(outputs(name, fused), outputs(name, eager), atol=1e-5)
    assert BUILDERS["decoder"](seed=0, attention="eager")(IDS, output_attentions=True).attentions[0].shape == (2, 2, 6, 6)


def test_labels_work_without_a_warning(caplog):
    loss = BUILDERS["decoder"](seed=0)(IDS, labels=IDS).loss
    logits = BUILDERS["decoder"](seed=0)(IDS).logits
    assert torch.allclose(loss, nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))
    assert not caplog.records


def test_masked_autoencoders_share_a_mask():
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    teacher, student = M.vit_mae(8, 2, width=32, heads=2, seed=0), M.vit_mae(8, 2, width=16, heads=2, seed=1)
    assert torch.equal(teacher(PICTURES, noise=noise).mask, student(PICTURES, noise=noise).mask)


# ---- counts -----------------------------------------------------------------------------------------------------------------------------------------
def test_parameter_count_counts_ties_once():
    for name in ("decoder", "encoder", "encoder_decoder", "t5"):
        model = BUILDERS[name](seed=0)
        assert M.parameter_count(model).total == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    model = BUILDERS["decoder"](seed=0)
    assert M.parameter_count(model) == (40 * 16 + 8 * 16 + 2 * (12 * 256 + 13 * 16) + 32,) * 2 + (40 * 16 + 8 * 16,)
    M.freeze(model.transformer.h[0])
    assert M.parameter_count(model).trainable == M.parameter_count(model).total - 12 * 256 - 13 * 16


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_flops_of_attention_do_not_depend_on_the_kernel(attention, padded):
    model = M.encoder(40, width=16, layers=2, heads=2, feed_forward=32, max_length=8, attention=attention, seed=0)
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0 if padded else 1
    body = 2 * (2 * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 6 * 16)
    head = 2 * (16 * 16 + 16 * 40)
    assert M.flop_count(model, IDS, attention_mask=mask) == 12 * (body + head)


def test_flops_of_other_models():
    assert M.flop_count(nn.Linear(3, 5), torch.ones(7, 3)) == 2 * 7 * 3 * 5
    assert M.flop_count(nn.Conv2d(2, 4, 3, padding=1), torch.ones(1, 2, 8, 8)) == 2 * 64 * 4 * 2 * 9
    few, many = (M.flop_count(M.moe_decoder(40, width=16, heads=2, experts=n, seed=0), IDS) for n in (2, 6))
    assert 0 < many - few == 12 * 2 * 2 * 4 * 16  # 2 layers, 4 more rows of the router
    assert many > 12 * 2 * 2 * 2 * 3 * 16 * 32  # the experts are counted


def test_flop_count_leaves_the_model_as_it_was():
    model = M.SmallConvNet(3, channels=3, seed=0).train()
    model.head.eval()
    before = copy.deepcopy(model.state_dict())
    M.flop_count(model, PICTURES)
    assert model.training and model.blocks.training and not model.head.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))


def test_active_parameters():
    dense, mixture = M.moe_decoder(40, width=16, heads=2, experts=2, seed=0), M.moe_decoder(40, width=16, heads=2, experts=5, seed=0)
    assert M.active_parameter_count(dense) == M.parameter_count(dense).total
    assert M.active_parameter_count(mixture) == M.parameter_count(dense).total + 2 * 3 * 16  # the router's rows
    with pytest.raises(ValueError, match="mixture of experts, got GPT2LMHeadModel"):
        M.active_parameter_count(BUILDERS["decoder"]())


# ---- frozen models ------------------------------------------------------------------------------------------------------------------------------------
def test_freeze_and_frozen_copy():
    model = BUILDERS["decoder"](seed=0)
    copied = M.frozen_copy(model)
    assert not copied.training and not any(p.requires_grad for p in copied.parameters())
    assert model.training is not None and all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    assert copied.transformer.wte.weight.abs().sum() > 0 and copied.lm_head.weight is copied.transformer.wte.weight
    assert M.freeze(model) is model and not model.training


# ---- layers from the teacher -----------------------------------------------------------------------------------------------------------------------------
def test_layer_map_known_values():
    assert M.layer_map(6, 12) == [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]
    assert M.layer_map(3, 12, "last") == [(1, 10), (2, 11), (3, 12)]
    assert M.layer_map(4, 4) == M.layer_map(4, 4, "last") == [(j, j) for j in range(1, 5)]


@given(st.integers(1, 24), st.integers(1, 24), st.sampled_from(["skip", "last"]))
def test_layer_map_is_increasing_and_ends_at_the_top(student, teacher, strategy):
    student, teacher = sorted((student, teacher))
    pairs = M.layer_map(student, teacher, strategy)
    assert [j for j, _ in pairs] == list(range(1, student + 1))
    assert pairs[-1][1] == teacher and pairs[0][1] >= 1
    assert all(a < b for (_, a), (_, b) in zip(pairs, pairs[1:]))


TEACHERS = {
    "decoder": (lambda: M.decoder(40, width=16, layers=4, heads=2, max_length=8, seed=0), "transformer.h"),
    "encoder": (lambda: M.encoder(40, width=16, layers=4, heads=2, max_length=8, seed=0), "roberta_prelayernorm.encoder.layer"),
    "body": (lambda: M.encoder(40, width=16, layers=4, heads=2, max_length=8, head=None, seed=0), "encoder.layer"),
    "moe": (lambda: M.moe_decoder(40, width=16, layers=4, heads=2, max_length=8, seed=0), "model.layers"),
    "vit": (lambda: M.vit(8, 4, num_classes=3, width=16, layers=4, heads=2, seed=0), None),
    "vit_mae": (lambda: M.vit_mae(8, 2, width=16, layers=4, heads=2, decoder_width=8, decoder_layers=2, seed=0), None),
    "encoder_decoder": (lambda: M.encoder_decoder(40, width=16, layers=4, heads=2, max_length=8, seed=0), "model.encoder.layers"),
    "t5": (lambda: M.t5(40, width=16, layers=4, heads=2, seed=0), "encoder.block"),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_with_all_layers_is_its_teacher(name):
    teacher = TEACHERS[name][0]()
    student = M.student_from_teacher(M.freeze(teacher), range(4)).eval()
    with torch.no_grad():
        assert torch.allclose(outputs(name, teacher), outputs(name, student), atol=1e-6)
    pointers = {p.data_ptr() for p in teacher.parameters()}
    assert not pointers & {p.data_ptr() for p in student.parameters()}


@pytest.mark.parametrize("name", TEACHERS)
def test_students_are_trainable_independent_and_survive_saving(name, tmp_path):
    teacher = M.freeze(TEACHERS[name][0]())
    before = copy.deepcopy(teacher.state_dict())
    student = M.student_from_teacher(teacher, [3, 1])
    assert student.training and not teacher.training
    fixed = M.parameter_count(student).total - M.parameter_count(student).trainable
    assert fixed == (17 * 16 + 17 * 8 if name == "vit_mae" else 0)  # its sines are no weights
    optimiser = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    outputs(name, student).square().mean().backward()
    optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), teacher.state_dict().values()))
    student.eval().save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval() if name != "body" else type(student).from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert torch.allclose(outputs(name, student), outputs(name, again), atol=1e-6)


@pytest.mark.parametrize("name", [n for n, (_, stack) in TEACHERS.items() if stack])
def test_layers_are_copied_in_the_given_order(name):
    build, stack = TEACHERS[name]
    teacher = build()
    student = M.student_from_teacher(teacher, [3, 1])
    for position, source in enumerate([3, 1]):
        ours, theirs = dict(student.get_submodule(stack)[position].named_parameters()), dict(teacher.get_submodule(stack)[source].named_parameters())
        shared = ours.keys() & theirs.keys()
        assert shared and all(torch.equal(ours[key], theirs[key]) for key in shared)
        assert {key for key in ours.keys() ^ theirs.keys() if "relative_attention_bias" not in key} == set()
    other = {key for key in teacher.state_dict() if not key.startswith(stack) and ".layers." not in key and ".block." not in key}
    assert all(torch.equal(teacher.state_dict()[key], student.state_dict()[key]) for key in other)


def test_student_layers_equal_a_hand_made_forward():
    teacher = TEACHERS["decoder"][0]().eval()
    student = M.student_from_teacher(teacher, [0, 2]).eval()
    body = teacher.transformer
    hidden = body.wte(IDS) + body.wpe(torch.arange(6))
    for layer in (body.h[0], body.h[2]):
        out = layer(hidden, attention_mask=None)
        hidden = out[0] if isinstance(out, tuple) else out
    assert torch.allclose(teacher.lm_head(body.ln_f(hidden)), student(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["decoder", "moe", "encoder_decoder", "t5"])
def test_students_can_generate_with_their_cache(name):
    student = M.student_from_teacher(TEACHERS[name][0](), [2, 3]).eval()
    options = dict(max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(IDS), pad_token_id=0, eos_token_id=None)
    assert torch.equal(student.generate(IDS, use_cache=True, **options), student.generate(IDS, use_cache=False, **options))


@pytest.mark.parametrize("name", ["encoder_decoder", "t5"])
def test_both_stacks_of_an_encoder_decoder(name):
    teacher = TEACHERS[name][0]()
    both = M.student_from_teacher(teacher, [0, 3])
    only = M.student_from_teacher(teacher, [0, 1, 2, 3], decoder_layers=[2])
    depth = (lambda m: (len(m.model.encoder.layers), len(m.model.decoder.layers))) if name == "encoder_decoder" else (lambda m: (len(m.encoder.block), len(m.decoder.block)))
    assert depth(both) == (2, 2) and depth(only) == (4, 1)
    assert only.config.num_hidden_layers == 4
    assert (only.config.decoder_layers if name == "encoder_decoder" else only.config.num_decoder_layers) == 1
    assert outputs(name, only).shape == (2, 3, 40)


def test_t5_keeps_its_relative_positions_when_the_first_layer_goes():
    teacher = TEACHERS["t5"][0]()
    student = M.student_from_teacher(teacher, [2, 0])
    first, second = (block.layer[0].SelfAttention for block in student.encoder.block)
    assert torch.equal(first.relative_attention_bias.weight, teacher.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    assert first.has_relative_attention_bias and not second.has_relative_attention_bias and not hasattr(second, "relative_attention_bias")


@pytest.mark.parametrize("teacher, layers, options, message", [
    ("decoder", [0, 4], {}, "layers must be numbers from 0 to 3 (the teacher has 4 layers in transformer.h), got [0, 4]"),
    ("decoder", [], {}, "got []"),
    ("decoder", [-1], {}, "got [-1]"),
    ("decoder", [0], {"decoder_layers": [0]}, "decoder_layers must be None, because GPT2LMHeadModel has one stack"),
    ("t5", [0], {"decoder_layers": [9]}, "decoder_layers must be numbers from 0 to 3"),
])
def test_wrong_layers_are_refused(teacher, layers, options, message):
    with pytest.raises(ValueError) as error:
        M.student_from_teacher(TEACHERS[teacher][0](), layers, **options)
    assert message in str(error.value)


@pytest.mark.parametrize("model", [M.mlp([2, 2]), M.small_resnet(2, widths=(4, 4)), M.GRUDecoder(5)])
def test_models_without_layers_are_refused(model):
    with pytest.raises(ValueError, match="teacher must be a transformers model with a stack of layers, got " + type(model).__name__):
        M.student_from_teacher(model, [0])


# ---- capture --------------------------------------------------------------------------------------------------------------------------------------------
def test_capture_gives_outputs_with_gradients_and_cleans_up():
    model = M.mlp([3, 4, 2], seed=0)
    x = torch.ones(5, 3)
    with M.capture(model, ["0", "2"]) as inside:
        out = model(x)
    assert torch.equal(inside["2"], out) and torch.equal(inside["0"], model[0](x))
    inside["0"].sum().backward()
    assert torch.equal(model[0].weight.grad, torch.full((4, 3), 5.0)) and model[2].weight.grad is None
    model(2 * x)
    assert torch.equal(inside["2"], out)  # nothing is recorded after the context
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_capture_agrees_with_hidden_states_of_transformers():
    model = M.encoder(40, width=16, heads=2, head=None, seed=0).eval()
    with M.capture(model, "encoder.layer.0") as out, M.capture(model, "encoder.layer.1", of="input") as entering:
        states = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(out["encoder.layer.0"], states[1]) and torch.equal(entering["encoder.layer.1"], states[1])


def test_capture_removes_hooks_after_an_error_and_keeps_the_last_pass():
    model = M.mlp([3, 2])
    with pytest.raises(RuntimeError):
        with M.capture(model, "0") as inside:
            model(torch.ones(1, 3))
            model(torch.zeros(4, 3))
            assert inside["0"].shape == (4, 2)
            raise RuntimeError
    assert not model[0]._forward_hooks


def test_capture_refuses_unknown_names():
    with pytest.raises(ValueError, match="got 'transformer.h.7.attn'; near to it: .*transformer.h.1.attn"):
        with M.capture(BUILDERS["decoder"](), "transformer.h.7.attn"):
            pass
    with pytest.raises(ValueError, match="of must be 'output' or 'input', got 'grad'"):
        with M.capture(M.mlp([1, 1]), "0", of="grad"):
            pass


# ---- pooling and own networks ----------------------------------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 99))
def test_mean_pool_is_the_mean_of_the_counted_rows(lengths, seed):
    hidden = torch.randn(len(lengths), 6, 3, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    expected = torch.stack([row[:n].mean(0) for row, n in zip(hidden, lengths)])
    assert torch.allclose(M.mean_pool(hidden, mask), expected, atol=1e-6)
    spoiled = torch.where(mask[..., None], hidden, torch.tensor(float("nan"))).requires_grad_()
    pooled = M.mean_pool(spoiled, mask.long())
    pooled.sum().backward()
    assert torch.allclose(pooled, expected, atol=1e-6) and torch.isfinite(spoiled.grad[mask]).all() and (spoiled.grad[~mask] == 0).all()


def test_mean_pool_keeps_leading_dimensions_and_refuses_empty_rows():
    hidden = torch.rand(2, 3, 4, 5)
    assert M.mean_pool(hidden, torch.ones(2, 3, 4)).shape == (2, 3, 5)
    assert M.mean_pool(hidden[:, None, 0], torch.eye(4).bool().expand(2, 4, 4)[:, :1]).shape == (2, 1, 5)
    spans = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 1, 0]]).expand(2, 3, 4)  # three spans of one text
    pooled = M.mean_pool(hidden[:, :1], spans)
    assert torch.allclose(pooled[:, 0], hidden[:, 0, :2].mean(1)) and torch.allclose(pooled[:, 1], hidden[:, 0, 3]) and pooled.shape == (2, 3, 5)
    with pytest.raises(ValueError, match="a row has none"):
        M.mean_pool(hidden[0], torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]))
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3, 4\), got \(2, 4\)"):
        M.mean_pool(hidden, torch.ones(2, 4))


def test_mlp_layout():
    kinds = [type(module).__name__ for module in M.mlp([3, 4, 5, 2], activation="relu", norm=True)]
    assert kinds == ["Linear", "ReLU", "LayerNorm", "Linear", "ReLU", "LayerNorm", "Linear"]
    assert [type(module).__name__ for module in M.mlp([3, 2])] == ["Linear"]


@pytest.mark.parametrize("norm", ["batch", "instance", None])
@pytest.mark.parametrize("feature_size", [None, 5])
def test_conv_net_shapes(norm, feature_size):
    model = M.SmallConvNet(4, image_size=(40, 64), widths=(3, 6), feature_size=feature_size, norm=norm, pool="avg", seed=0)
    x = torch.rand(2, 1, 40, 64)
    logits, feature = model(x)
    size = feature_size or 6 * 10 * 16
    assert logits.shape == (2, 4) and feature.shape == (2, size) == (2, model.feature_size)
    assert torch.equal(model.eval().embed(x), model(x)[1])


def test_resnets_have_the_sizes_of_the_literature():
    assert M.parameter_count(M.small_resnet(10, blocks=3)).total == pytest.approx(272_474)  # 0.27 million, He et al. 2016
    model = M.resnet18(10)
    assert M.parameter_count(model).total == 11_173_962
    logits, feature = model.eval()(torch.rand(1, 3, 32, 32))
    assert logits.shape == (1, 10) and feature.shape == (1, 512) == model.embed(torch.rand(1, 3, 32, 32)).shape


def test_gru_decoder_is_causal_and_continues():
    model, state = M.GRUDecoder(40, width=8, embedding=4, seed=0), torch.randn(2, 8)
    whole, end = model(IDS, state)
    changed, _ = model(torch.cat([IDS[:, :4], (IDS[:, 4:] + 1) % 40], 1), state)
    assert torch.allclose(whole[:, :4], changed[:, :4]) and not torch.allclose(whole[:, 4:], changed[:, 4:])
    first, middle = model(IDS[:, :1], state)
    rest, last = model(IDS[:, 1:], middle)
    assert torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-6) and torch.allclose(end, last, atol=1e-6)


# ---- loading ----------------------------------------------------------------------------------------------------------------------------------------------
def test_pretrained_reads_a_saved_folder(tmp_path):
    model = BUILDERS["decoder"](seed=0).eval()
    model.save_pretrained(tmp_path)
    loaded = M.pretrained(str(tmp_path), task="causal")
    assert not loaded.training and torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert M.pretrained(str(tmp_path), task="causal", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_pretrained_refuses_pickles(tmp_path):
    model = BUILDERS["decoder"](seed=0)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="holds no model that can be loaded"):
        M.pretrained(str(tmp_path), task="causal")


def test_pretrained_says_what_to_do_without_a_network():
    with pytest.raises(FileNotFoundError) as error:
        M.pretrained("someone/something", revision="abc123", local_only=True)
    for part in ("'someone/something' (revision abc123)", "hf download someone/something --revision abc123", "models--someone--something", "safetensors"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="task must be one of features, mlm"):
        M.pretrained("x/y", task="ner")


def test_importing_the_module_does_not_import_transformers():
    import subprocess
    import sys
    code = "import sys, kdbook.models, kdbook.text; assert 'transformers' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_masked_autoencoder_knows_where_its_patches_are():
    """transformers 5 leaves these at zero when a model is made from a configuration; then every patch is painted alike."""
    model = M.vit_mae(8, 2, width=16, heads=2, decoder_width=8, seed=3)
    for positions in (model.vit.embeddings.position_embeddings[0], model.decoder.decoder_pos_embed[0]):
        assert len(torch.unique(positions[1:], dim=0)) == 16 and not positions[0].any() and not positions.requires_grad
    assert model.decoder.mask_token.abs().sum() > 0
    painted = model(torch.zeros(1, 3, 8, 8), noise=torch.arange(16.0)[None]).logits[0]  # all patches look the same, only places differ
    assert len(torch.unique(painted, dim=0)) == 16
