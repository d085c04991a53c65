"""Log-probabilities through the output head, against the full softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from rlhf_lightning import functional
from rlhf_lightning.functional import _chunked_head
from rlhf_lightning.functional import logprobs as module

VOCABULARY, HIDDEN, ROWS, TOKENS = 31, 8, 3, 6
HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"logit_scale": 0.5},
    "softcap": {"softcap": 2.0},
    "all": {"temperature": 1.3, "logit_scale": 1.7, "softcap": 1.5},
}


def token_logprobs(*args, **options):
    """Log-probabilities and entropies."""
    return functional.token_logprobs(*args, **options)[:2]


def logprobs_from_logits(*args, **options):
    """Log-probabilities and entropies."""
    return functional.logprobs_from_logits(*args, **options)[:2]


@pytest.fixture
def inputs():
    return make_inputs()


def make_inputs(dtype=torch.float64, bias: bool = True, rows: int = ROWS):
    """Hidden states, head, ids and mask; the last row has no loss token."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    loss_mask = torch.rand(rows, TOKENS, generator=generator) < 0.6
    loss_mask[:, 0], loss_mask[0, 1], loss_mask[-1] = False, True, False
    return {
        "hidden": randn(rows, TOKENS, HIDDEN).requires_grad_(),
        "head_weight": randn(VOCABULARY, HIDDEN).requires_grad_(),
        "head_bias": randn(VOCABULARY).requires_grad_() if bias else None,
        "input_ids": torch.randint(0, VOCABULARY, (rows, TOKENS), generator=generator),
        "loss_mask": loss_mask,
    }


def reference(
    hidden,
    head_weight,
    input_ids,
    loss_mask,
    *,
    head_bias=None,
    temperature=1.0,
    logit_scale=1.0,
    softcap=None,
):
    """The full [B, T, V] softmax, as a textbook has it."""
    logits = F.linear(hidden, head_weight, head_bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = (logits / temperature).log_softmax(-1)
    picked = log_p[:, :-1].gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    entropy = -(log_p * log_p.exp()).sum(-1)[:, :-1]
    keep = loss_mask[:, 1:]
    return tuple(F.pad(torch.where(keep, x, 0), (1, 0)) for x in (picked, entropy))


def gradients(outputs, weights, inputs):
    """Gradients of a weighted sum of the outputs, for every parameter."""
    loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    wanted = [inputs[name] for name in ("hidden", "head_weight", "head_bias")]
    return torch.autograd.grad(loss, [tensor for tensor in wanted if tensor is not None])


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_values_and_gradients_are_those_of_the_full_softmax(head, bias, chunk_size):
    inputs = make_inputs(bias=bias)
    ours = token_logprobs(**inputs, **HEADS[head], chunk_size=chunk_size, with_entropy=True)
    theirs = reference(**inputs, **HEADS[head])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.manual_seed(1)
    both = tuple(torch.randn(ROWS, TOKENS, dtype=torch.float64) for _ in range(2))
    zero = torch.zeros(ROWS, TOKENS, dtype=torch.float64)
    for weights in [both, (both[0], zero), (zero, both[1])]:
        found, expected = gradients(ours, weights, inputs), gradients(theirs, weights, inputs)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        ours = token_logprobs(**inputs, **HEADS[head], chunk_size=chunk_size, with_entropy=True)
        theirs = reference(**inputs, **HEADS[head])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_from_logits_is_the_same(inputs, temperature):
    logits = F.linear(inputs["hidden"], inputs["head_weight"], inputs["head_bias"])
    before = logits.detach().clone()
    ours = logprobs_from_logits(
        logits,
        inputs["input_ids"],
        inputs["loss_mask"],
        temperature=temperature,
        with_entropy=True,
    )
    theirs = reference(**inputs, temperature=temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.rand(2, ROWS, TOKENS, dtype=torch.float64)
    found, expected = (gradients(outputs, weights, inputs) for outputs in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("chunk_size", [2, 100])
@pytest.mark.parametrize("head", ["plain", "all"])
def test_gradcheck(inputs, head, chunk_size):
    ids, loss_mask = inputs["input_ids"], inputs["loss_mask"]

    def outputs(hidden, weight, bias):
        return token_logprobs(
            hidden,
            weight,
            ids,
            loss_mask,
            head_bias=bias,
            chunk_size=chunk_size,
            with_entropy=True,
            **HEADS[head],
        )

    parameters = (inputs["hidden"], inputs["head_weight"], inputs["head_bias"])
    assert torch.autograd.gradcheck(outputs, parameters, fast_mode=True)


def test_uniform_logits_by_hand(inputs):
    inputs["head_weight"] = torch.zeros(VOCABULARY, HIDDEN)
    inputs["head_bias"] = None
    for chunk_size in (1, None):
        logprobs, entropy = token_logprobs(
            **{**inputs, "hidden": inputs["hidden"].detach().float()},
            chunk_size=chunk_size,
            with_entropy=True,
        )
        counts = inputs["loss_mask"].float()
        torch.testing.assert_close(logprobs, -math.log(VOCABULARY) * counts)
        torch.testing.assert_close(entropy, math.log(VOCABULARY) * counts)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_the_forward_pass_is_bitwise_the_same_without_gradients(chunk_size, with_entropy):
    """R29: the first ratio is exactly 1."""
    inputs = make_inputs(torch.float32)
    options = {"chunk_size": chunk_size, "with_entropy": with_entropy, "temperature": 0.9}
    with_grad = token_logprobs(**inputs, **options)[0]
    with torch.no_grad():
        without = token_logprobs(**inputs, **options)[0]
    assert torch.equal(with_grad, without)


@pytest.mark.parametrize("chunk_size", [2, 100])
@pytest.mark.parametrize("head", HEADS)
def test_accuracy_is_whether_the_token_is_the_argmax(head, chunk_size):
    inputs = make_inputs()
    logits = F.linear(inputs["hidden"], inputs["head_weight"], inputs["head_bias"])
    best = F.pad(logits.argmax(-1)[:, :-1], (1, 0))
    inputs["input_ids"] = torch.where(torch.rand(ROWS, TOKENS) < 0.5, best, inputs["input_ids"])
    expected = (inputs["input_ids"] == best) & inputs["loss_mask"]
    assert 0 < expected.sum() < inputs["loss_mask"].sum()
    options = {"with_accuracy": True, **HEADS[head]}
    found = functional.token_logprobs(**inputs, chunk_size=chunk_size, **options)
    assert found.entropy is None
    assert torch.equal(found.correct, expected)
    ids, loss_mask = inputs["input_ids"], inputs["loss_mask"]
    full = functional.logprobs_from_logits(logits, ids, loss_mask, with_accuracy=True)
    assert torch.equal(full.correct, expected)
    found.logprobs.sum().backward()  # a flag among the outputs does not disturb the gradient
    whole = make_inputs()
    token_logprobs(**{**whole, "input_ids": ids}, **HEADS[head])[0].sum().backward()
    torch.testing.assert_close(inputs["hidden"].grad, whole["hidden"].grad)


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_predictors_say_which_hidden_state_predicts_a_token(inputs, chunk_size):
    """Hidden states in any order and shape give the same, to the last bit."""
    expected = token_logprobs(**inputs, chunk_size=chunk_size, with_entropy=True)
    order = torch.randperm(ROWS * TOKENS, generator=torch.Generator().manual_seed(2))
    hidden = inputs["hidden"].flatten(0, 1)[order][None]
    b, t = inputs["loss_mask"].nonzero().unbind(1)
    predictors = order.argsort()[b * TOKENS + t - 1]
    moved = {**inputs, "hidden": hidden, "predictors": predictors}
    found = token_logprobs(**moved, chunk_size=chunk_size, with_entropy=True)
    assert all(map(torch.equal, found, expected))
    weights = torch.rand(2, ROWS, TOKENS, dtype=torch.float64)
    assert all(
        map(torch.equal, gradients(found, weights, inputs), gradients(expected, weights, inputs))
    )
    logits = F.linear(hidden, inputs["head_weight"], inputs["head_bias"])
    ids, loss_mask = inputs["input_ids"], inputs["loss_mask"]
    full = logprobs_from_logits(logits, ids, loss_mask, predictors=predictors, with_entropy=True)
    torch.testing.assert_close(full, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=rf"predictors must be \[N\], here \[{len(b)}\]"):
        token_logprobs(**{**moved, "predictors": predictors[1:]})


def saved_numels(chunk_size):
    numels = []

    def pack(tensor):
        numels.append(tensor.numel())
        return tensor

    inputs = make_inputs(torch.float32, rows=20)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs, _ = token_logprobs(**inputs, chunk_size=chunk_size, with_entropy=True)
    num_tokens = int(inputs["loss_mask"].sum())
    # The parameters and a copy of the hidden states are held in any case.
    parameters = VOCABULARY * HIDDEN, VOCABULARY, num_tokens * HIDDEN
    return num_tokens, [numel for numel in numels if numel not in parameters], logprobs


def test_no_logits_are_held_for_the_backward_pass():
    num_tokens, numels, logprobs = saved_numels(chunk_size=4)
    assert numels
    assert max(numels) <= 2 * num_tokens
    num_tokens, numels, _ = saved_numels(chunk_size=10_000)
    assert max(numels) == num_tokens * VOCABULARY  # what the check above would find
    assert logprobs.requires_grad


def test_the_chunk_is_chosen_by_a_byte_budget(monkeypatch):
    """By default a small head takes one pass, which holds what autograd wants."""
    sizes = []
    original = _chunked_head._linear_chunks

    def spy(hidden, weight, bias, dtype, chunk_size):
        sizes.append(chunk_size)
        return original(hidden, weight, bias, dtype, chunk_size)

    monkeypatch.setattr(_chunked_head, "_linear_chunks", spy)
    inputs = make_inputs(torch.float32)
    token_logprobs(**inputs)
    assert sizes == []
    monkeypatch.setattr(module, "_CHUNK_BYTES", 2 * VOCABULARY * 4)
    token_logprobs(**inputs)
    assert sizes == [2]
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    token_logprobs(**inputs)
    assert sizes == [2, 1]


@pytest.mark.parametrize("chunk_size", [2, 100])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_hidden_states_reach_neither_value_nor_gradient(inputs, poison, chunk_size):
    """R8: hidden states that predict no loss token, whatever they hold."""
    clean = token_logprobs(**inputs, chunk_size=chunk_size, with_entropy=True)
    weights = torch.rand(2, ROWS, TOKENS, dtype=torch.float64)
    expected = gradients(clean, weights, inputs)
    predicts = F.pad(inputs["loss_mask"][:, 1:], (0, 1))
    hidden = torch.where(predicts[..., None], inputs["hidden"].detach(), poison).requires_grad_()
    poisoned = {**inputs, "hidden": hidden}
    outputs = token_logprobs(**poisoned, chunk_size=chunk_size, with_entropy=True)
    found = gradients(outputs, weights, poisoned)
    assert all(map(torch.equal, outputs, clean))
    assert all(map(torch.equal, found, expected))
    assert (outputs[0][~inputs["loss_mask"]] == 0).all()
    assert (found[0][~predicts] == 0).all()


def test_position_0_never_counts(inputs):
    expected = token_logprobs(**inputs)[0]
    loss_mask = inputs["loss_mask"].clone()
    loss_mask[:, 0] = True
    assert torch.equal(token_logprobs(**{**inputs, "loss_mask": loss_mask})[0], expected)


@pytest.mark.parametrize("shape", [(2, 5), (2, 1), (0, 5)])
def test_no_loss_token_gives_a_zero_that_is_connected_to_the_graph(shape):
    """R9, P2-29: DDP waits for the gradient of every parameter."""
    hidden = torch.randn(*shape, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    bias = torch.randn(VOCABULARY, requires_grad=True)
    ids, loss_mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    outputs = [
        *token_logprobs(hidden, weight, ids, loss_mask, head_bias=bias, with_entropy=True),
        logprobs_from_logits(F.linear(hidden, weight, bias), ids, loss_mask)[0],
    ]
    for output in outputs:
        assert output.tolist() == torch.zeros(shape).tolist()
        found = torch.autograd.grad(output.sum(), (hidden, weight, bias), retain_graph=True)
        for gradient in found:
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_impossible_tokens_count_as_zero_in_the_entropy(inputs, chunk_size):
    """A head whose padded vocabulary has a bias of -inf."""
    bias = inputs["head_bias"].detach().clone()
    bias[-5:] = -math.inf
    inputs["input_ids"] %= VOCABULARY - 5
    outputs = token_logprobs(
        **{**inputs, "head_bias": bias}, chunk_size=chunk_size, with_entropy=True
    )
    smaller = {
        **inputs,
        "head_weight": inputs["head_weight"][:-5],
        "head_bias": bias[:-5],
    }
    expected = reference(**smaller)
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-12)
    weights = torch.rand(2, ROWS, TOKENS, dtype=torch.float64)
    wanted = {**inputs, "head_bias": None}
    found, expected = gradients(outputs, weights, wanted), gradients(expected, weights, wanted)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_large_logits_do_not_overflow(scale):
    inputs = make_inputs(torch.float32, bias=False)
    inputs["hidden"] = (inputs["hidden"].detach() * scale).requires_grad_()
    chunked = token_logprobs(**inputs, chunk_size=2, with_entropy=True)
    theirs = reference(**inputs)
    torch.testing.assert_close(chunked, theirs, rtol=1e-5, atol=1e-3)
    (chunked[0].sum() + chunked[1].sum()).backward()
    assert torch.isfinite(inputs["hidden"].grad).all()


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_half_precision_heads(chunk_size):
    """Log-probabilities are float32; gradients have the parameters' precision."""
    inputs, exact = make_inputs(torch.bfloat16), make_inputs(torch.float64)
    outputs = token_logprobs(**inputs, chunk_size=chunk_size, with_entropy=True)
    expected = reference(**exact)
    assert {output.dtype for output in outputs} == {torch.float32}
    torch.testing.assert_close(outputs, tuple(x.float() for x in expected), rtol=0.05, atol=0.05)
    weights = torch.rand(2, ROWS, TOKENS, dtype=torch.float64)
    found, wanted = gradients(outputs, weights, inputs), gradients(expected, weights, exact)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, rtol=0.1, atol=0.1)


def test_chunks_of_a_half_precision_head_are_summed_in_float32():
    """300 equal contributions: a sum in bfloat16 stops growing at 256 times the first."""
    num_tokens = 300
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.ones(1, num_tokens + 1, 1, dtype=torch.bfloat16)
    loss_mask = torch.arange(num_tokens + 1)[None] > 0
    ids = torch.zeros(1, num_tokens + 1, dtype=torch.long)
    logprobs, _ = token_logprobs(hidden, weight, ids, loss_mask, chunk_size=1)
    logprobs.sum().backward()
    assert weight.grad.tolist() == [[num_tokens / 2], [-num_tokens / 2]]


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_autocast_does_to_the_head_what_it_does_to_a_linear_layer(chunk_size):
    inputs = make_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = token_logprobs(**inputs, chunk_size=chunk_size, with_entropy=True)
        expected = reference(**inputs)
    exact = reference(**inputs)[0]
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    assert (outputs[0] - exact).abs().max() > 1e-4  # the product was rounded to bfloat16
    weights = torch.rand(2, ROWS, TOKENS)
    found, wanted = gradients(outputs, weights, inputs), gradients(expected, weights, inputs)
    assert {gradient.dtype for gradient in found} == {torch.float32}
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        double = token_logprobs(**make_inputs(), chunk_size=chunk_size)[0]
    assert torch.equal(double, token_logprobs(**make_inputs(), chunk_size=chunk_size)[0])


def test_frozen_parts_get_no_gradient():
    """LoRA freezes the head; a linear probe freezes the backbone."""
    for frozen in ("hidden", "head_weight", "head_bias"):
        inputs = make_inputs()
        inputs[frozen] = inputs[frozen].detach()
        token_logprobs(**inputs, chunk_size=2)[0].sum().backward()
        assert inputs[frozen].grad is None
        whole = make_inputs()
        token_logprobs(**whole, chunk_size=2)[0].sum().backward()
        for name in {"hidden", "head_weight", "head_bias"} - {frozen}:
            assert torch.equal(inputs[name].grad, whole[name].grad)


def test_the_gradient_can_be_asked_for_twice(inputs):
    for chunk_size in (2, 100):
        outputs = token_logprobs(**inputs, chunk_size=chunk_size)
        first = torch.autograd.grad(outputs[0].sum(), inputs["hidden"], retain_graph=True)
        second = torch.autograd.grad(outputs[0].sum(), inputs["hidden"])
        assert torch.equal(*first, *second)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature is 0.0; it must be greater than 0"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
        ({"chunk_size": 0}, ValueError, "chunk_size is 0"),
        (
            {"hidden": torch.zeros(3, 5, 8)},
            ValueError,
            r"hidden must be \[B, T, H\], here \[3, 6, H\]",
        ),
        ({"head_weight": torch.zeros(31, 9)}, ValueError, r"head_weight must be \[V, H\]"),
        ({"head_bias": torch.zeros(30)}, ValueError, r"head_bias must be \[V\], here \[31\]"),
        ({"input_ids": torch.zeros(3, 5)}, ValueError, r"input_ids must be \[B, T\]"),
        ({"loss_mask": torch.zeros(3, 6)}, TypeError, "loss_mask must be bool"),
    ],
)
def test_bad_input_is_refused(inputs, change, error, message):
    with pytest.raises(error, match=message):
        token_logprobs(**{**inputs, **change})


def test_bad_logits_are_refused(inputs):
    ids, loss_mask = inputs["input_ids"], inputs["loss_mask"]
    with pytest.raises(ValueError, match=r"logits must be \[B, T, V\], here \[3, 6, V\]"):
        logprobs_from_logits(torch.zeros(3, 5, 7), ids, loss_mask)
    with pytest.raises(ValueError, match="temperature is -1"):
        logprobs_from_logits(torch.zeros(3, 6, 7), ids, loss_mask, temperature=-1)
