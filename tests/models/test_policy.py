"""The policy's log-probabilities are the model's own, whatever its head, padding and mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhf_lightning.models.loading import ModelConfig, load_causal_lm, load_tokenizer
from rlhf_lightning.models.policy import CausalPolicy
from rlhf_lightning.models.reference import frozen_copy

VOCAB = 19
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
WITHOUT_KV_HEADS = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads",)}
GPT2 = {k: v for k, v in WITHOUT_KV_HEADS.items() if k not in ("intermediate_size", "pad_token_id")}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SMALL),
    "gpt2": ("gpt2", GPT2),
    "qwen2": ("qwen2", SMALL),
    "qwen3": ("qwen3", {**SMALL, "head_dim": 8}),
    "gemma2, softcapped": (
        "gemma2",
        {**SMALL, "head_dim": 4, "final_logit_softcapping": 0.2, "sliding_window": 16},
    ),
    "cohere, scaled": ("cohere", {**SMALL, "logit_scale": 0.0625}),
    "granite, divided": ("granite", {**SMALL, "logits_scaling": 8.0}),
    "phi, with a bias": ("phi", WITHOUT_KV_HEADS),
    "gemma2, with a window": ("gemma2", {**SMALL, "head_dim": 4, "sliding_window": 4}),
    "bloom, without positions": (
        "bloom",
        {"vocab_size": VOCAB, "hidden_size": 16, "n_layer": 2, "n_head": 4},
    ),
}


PADDED = ["gemma2, with a window", "bloom, without positions"]


def build(name: str = "llama", dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    model_type, defaults = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = AutoConfig.for_model(model_type, **{**defaults, **fields})
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():  # zero biases and small weights would hide mistakes
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Rows of 3 and 6 tokens, padded on the right to 7 columns."""
    input_ids = torch.tensor([[5, 6, 7, 0, 0, 0, 0], [3, 9, 4, 12, 18, 1, 0]])
    attention_mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    loss_mask = attention_mask.bool().clone()
    loss_mask[:, 0] = False
    loss_mask[1, 1] = False
    return input_ids, attention_mask, loss_mask


def from_full_logits(model: PreTrainedModel, temperature: float) -> Tensor:
    """Each row on its own, without padding, through the model's own head."""
    input_ids, attention_mask, loss_mask = batch()
    result = torch.zeros(input_ids.shape, dtype=torch.float64)
    for b, length in enumerate(attention_mask.sum(dim=1).tolist()):
        logits = model(input_ids[b : b + 1, :length]).logits[0].double() / temperature
        logprobs = logits.log_softmax(dim=-1)
        result[b, 1:length] = logprobs[:-1].gather(1, input_ids[b, 1:length, None])[:, 0]
    return torch.where(loss_mask, result, 0.0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_the_full_logits(name: str) -> None:
    model = build(name)
    weights = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    policy = CausalPolicy(model, packing=name not in PADDED)
    logprobs, entropy, correct = policy(*batch(), temperature=0.7)
    expected = from_full_logits(model, temperature=0.7)

    assert entropy is None
    assert correct is None
    torch.testing.assert_close(logprobs, expected, rtol=1e-9, atol=1e-11)
    parameters = list(model.parameters())
    ours = torch.autograd.grad((logprobs * weights).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)
    for mine, other, (label, _) in zip(ours, theirs, model.named_parameters(), strict=True):
        assert (mine is None) == (other is None), label
        if mine is not None:
            # transformers normalises in float32 here and there, whatever the dtype
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2, softcapped", *PADDED])
def test_padding_on_the_left_changes_nothing(name: str, packing: bool) -> None:
    policy = CausalPolicy(build(name), packing=packing and name not in PADDED)
    input_ids, attention_mask, loss_mask = batch()
    right, *_ = policy(input_ids, attention_mask, loss_mask)
    shifts = (7 - attention_mask.sum(dim=1)).tolist()
    moved = [
        torch.stack([row.roll(s) for row, s in zip(t, shifts, strict=True)])
        for t in (input_ids, attention_mask, loss_mask)
    ]
    left, *_ = policy(*moved)
    back = torch.stack([row.roll(-s) for row, s in zip(left, shifts, strict=True)])
    assert torch.equal(back, right)
    left.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters())


def test_the_pad_token_and_the_other_rows_do_not_matter() -> None:
    policy = CausalPolicy(build())
    input_ids, attention_mask, loss_mask = batch()
    together, *_ = policy(input_ids, attention_mask, loss_mask)
    other_pad = input_ids.masked_fill(attention_mask == 0, 1)  # pad == eos
    torch.testing.assert_close(policy(other_pad, attention_mask, loss_mask)[0], together)
    alone, *_ = policy(input_ids[1:, :6], attention_mask[1:, :6], loss_mask[1:, :6])
    torch.testing.assert_close(alone, together[1:, :6], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_grad_and_no_grad_agree_to_the_last_bit(dtype: torch.dtype, checkpointing: bool) -> None:
    model = build(dtype=dtype).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    policy = CausalPolicy(model)
    with torch.no_grad():
        before, *_ = policy(*batch())
    after, *_ = policy(*batch())
    assert after.requires_grad
    assert torch.equal(before, after)
    assert torch.equal(policy.eval()(*batch())[0], after)


def test_masks_of_another_shape_are_refused() -> None:
    input_ids, attention_mask, loss_mask = batch()
    with pytest.raises(ValueError, match=r"attention_mask \(2, 6\).*same shape"):
        CausalPolicy(build())(input_ids, attention_mask[:, :6], loss_mask)


def test_entropy_is_that_of_the_tempered_distribution() -> None:
    model = build()
    input_ids, attention_mask, loss_mask = batch()
    _, entropy, _ = CausalPolicy(model)(
        input_ids, attention_mask, loss_mask, temperature=2.0, with_entropy=True
    )
    logprobs = (model(input_ids[1:, :6]).logits[0] / 2.0).log_softmax(dim=-1)
    expected = -(logprobs.exp() * logprobs).sum(dim=-1)
    torch.testing.assert_close(entropy[1, 2:6], expected[1:5], rtol=1e-9, atol=1e-12)
    assert entropy[1, :2].tolist() == [0.0, 0.0]


class OddHead(nn.Linear):
    """Not what its weight says."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).sin()


def test_an_odd_head_is_served_by_the_full_forward_with_one_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    model = build()
    model.lm_head = OddHead(16, VOCAB, bias=False, dtype=torch.float64)
    policy = CausalPolicy(model)
    logprobs, *_ = policy(*batch(), temperature=0.5)
    torch.testing.assert_close(logprobs, from_full_logits(model, 0.5), rtol=1e-9, atol=1e-11)
    policy(*batch())
    messages = [str(w.message) for w in recwarn if "not a plain linear map" in str(w.message)]
    assert len(messages) == 1
    assert "LlamaForCausalLM" in messages[0]


def test_the_head_is_probed_once() -> None:
    model = build()
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    policy = CausalPolicy(model)
    for _ in range(2):
        policy(*batch())
    assert lengths == [7, 15, 8]  # the head, and the attention packed and padded


def test_the_probe_leaves_the_generators_alone_and_sees_through_dropout() -> None:
    model = build(attention_dropout=0.5).train()
    policy = CausalPolicy(model)
    torch.manual_seed(11)
    first, *_ = policy(*batch())  # probes
    torch.manual_seed(11)
    second, *_ = policy(*batch())
    assert torch.equal(first, second)
    assert policy._head is not None


def test_a_frozen_copy_stays_as_it_was() -> None:
    model = build().train()
    model.activation_checkpointing_enable()
    reference = frozen_copy(model)
    with torch.no_grad():
        before, *_ = CausalPolicy(reference)(*batch())
        for parameter in model.parameters():
            parameter.add_(1.0)
    after, *_ = CausalPolicy(reference)(*batch())
    assert torch.equal(before, after)
    assert not after.requires_grad
    assert not any(p.requires_grad for p in reference.parameters())
    assert not any(module.training for module in reference.modules())


def test_a_real_model_finds_text_likelier_than_noise(shared_data: Path) -> None:
    config = ModelConfig(path=str(shared_data / "models" / "stories260k"))
    tokenizer: Callable[..., Any] = load_tokenizer(config)
    policy = CausalPolicy(load_causal_lm(config, tokenizer))  # type: ignore[arg-type]
    text = "Once upon a time, there was a little girl named Lily."
    ids = torch.tensor([tokenizer(text).input_ids])
    noise = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    ones = torch.ones_like(ids)
    scores = [policy(x, ones, ones.bool())[0].mean().item() for x in (ids, noise)]
    assert scores[0] > -2.0
    assert scores[1] < -5.0
    again = AutoTokenizer.from_pretrained(config.path)
    assert again(text).input_ids == ids[0].tolist()
