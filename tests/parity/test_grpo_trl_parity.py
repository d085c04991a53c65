"""GRPO as TRL's ``GRPOTrainer`` computes it: the same tensors, the same loss, the same gradients.

Our side is composed of ``functional`` as a GRPO module composes it. TRL's side is a real trainer;
only its fused output head, a float32 kernel, is replaced by a float64 softmax over its logits. The
model is a GPT-2, because Llama's norm is float32 also in a float64 model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from trl_grpo import (
    EXACT,
    MAX_COMPLETION_LENGTH,
    VOCABULARY,
    make_model,
    make_trainer,
    use_float64,
)

from rlhf_lightning.functional import (
    aggregate_loss,
    clipped_policy_loss,
    group_advantages,
    kl_estimate,
    loss_units,
    token_logprobs,
)

COMPLETION_LENGTHS = (6, 2, 9, 4)


def make_rollouts(
    dtype: torch.dtype = torch.float64, prompt_lengths: tuple[int, ...] = (3, 3, 5, 5)
) -> dict[str, torch.Tensor]:
    """Rollouts as TRL has them: prompts padded on the left, completions on the right."""
    generator = torch.Generator().manual_seed(1)
    rows, longest = len(prompt_lengths), max(COMPLETION_LENGTHS)

    def randn():
        return torch.randn(rows, longest, generator=generator, dtype=torch.float64).to(dtype)

    width = max(prompt_lengths)
    prompt_mask = torch.arange(width) >= width - torch.tensor(prompt_lengths)[:, None]
    completion_mask = torch.arange(longest) < torch.tensor(COMPLETION_LENGTHS)[:, None]
    prompt_ids = torch.randint(2, VOCABULARY, prompt_mask.shape, generator=generator)
    completion_ids = torch.randint(2, VOCABULARY, (rows, longest), generator=generator)
    return {
        "prompt_ids": prompt_ids * prompt_mask,
        "prompt_mask": prompt_mask.long(),
        "completion_ids": completion_ids * completion_mask,
        "completion_mask": completion_mask.long(),
        "advantages": torch.tensor([0.7, -0.7, -1.2, 1.2], dtype=dtype),
        "old_per_token_logps": -2.5 + randn(),
        "ref_per_token_logps": -2.5 + randn(),
        "num_items_in_batch": completion_mask.sum(),
    }


def on_policy_plus_noise(model, rollouts, temperature, noise):
    """Old log-probabilities near the policy's: rows and tokens are clipped on either side."""
    aligned = align(rollouts)
    with torch.no_grad():
        logprobs = our_logprobs(model, aligned, temperature)[aligned["is_completion"]]
    old = torch.zeros_like(rollouts["old_per_token_logps"])
    old[rollouts["completion_mask"].bool()] = logprobs
    generator = torch.Generator().manual_seed(2)
    shift = torch.randn(old.shape, generator=generator, dtype=torch.float64).to(old.dtype)
    of_row = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]], dtype=old.dtype)
    return {**rollouts, "old_per_token_logps": old + noise * (shift + of_row)}


def align(rollouts: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The same rollouts as ``[B, T]`` tensors aligned with ``input_ids``, padded on the right."""
    prompt_mask = rollouts["prompt_mask"].bool()
    completion_mask = rollouts["completion_mask"].bool()
    lengths = prompt_mask.sum(1, keepdim=True), completion_mask.sum(1, keepdim=True)
    positions = torch.arange(int((lengths[0] + lengths[1]).max()))
    is_prompt = positions < lengths[0]
    is_completion = ~is_prompt & (positions < lengths[0] + lengths[1])
    input_ids = torch.zeros_like(is_prompt, dtype=torch.long)
    input_ids[is_prompt] = rollouts["prompt_ids"][prompt_mask]
    input_ids[is_completion] = rollouts["completion_ids"][completion_mask]

    def place(name: str) -> torch.Tensor:
        value = rollouts[name]
        aligned = torch.zeros(input_ids.shape, dtype=value.dtype)
        aligned[is_completion] = value[completion_mask]
        return aligned

    loss_mask = is_completion
    if "tool_mask" in rollouts:
        loss_mask = is_completion & place("tool_mask").bool()
    return {
        "input_ids": input_ids,
        "attention_mask": (is_prompt | is_completion).long(),
        "is_completion": is_completion,
        "loss_mask": loss_mask,
        "old_logprobs": place("old_per_token_logps"),
        "ref_logprobs": place("ref_per_token_logps"),
        "advantages": rollouts["advantages"][:, None].expand(input_ids.shape),
    }


def our_logprobs(model, batch, temperature, loss_mask=None):
    output = model.transformer(batch["input_ids"], attention_mask=batch["attention_mask"])
    return token_logprobs(
        output.last_hidden_state,
        model.lm_head.weight,
        batch["input_ids"],
        batch["is_completion"] if loss_mask is None else loss_mask,
        temperature=temperature,
        chunk_size=7,
    )[0]


@dataclass
class Setting:
    """One setting, in TRL's words and in ours."""

    theirs: dict[str, Any]
    aggregation: str = "token"
    policy_loss: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.4

    @property
    def beta(self) -> float:
        return self.theirs.get("beta", 0.0)

    @property
    def temperature(self) -> float:
        return self.theirs.get("temperature", 1.0)


def our_loss(model, batch, denominator, setting):
    """The loss of a GRPO module, in its own words."""
    loss_mask = batch["loss_mask"]
    logprobs = our_logprobs(model, batch, setting.temperature, loss_mask)
    policy = clipped_policy_loss(
        logprobs, batch["old_logprobs"], batch["advantages"], loss_mask, **setting.policy_loss
    )
    per_token = policy.loss
    if setting.beta:
        kl = kl_estimate(logprobs, batch["ref_logprobs"], "k3", loss_mask)
        if setting.theirs.get("use_bias_correction_kl"):
            kl = kl * policy.ratio
        per_token = per_token + setting.beta * kl
    return aggregate_loss(per_token, loss_mask, denominator, setting.aggregation == "sequence")


def denominator_of(micro_batches, setting):
    """Units of the optimizer step."""
    constant = MAX_COMPLETION_LENGTH if setting.aggregation == "constant" else None
    return sum(
        loss_units(batch["loss_mask"], setting.aggregation, constant).sum()
        for batch in micro_batches
    )


SETTINGS = {
    "grpo": Setting({"loss_type": "grpo"}, "sequence"),
    "bnpo": Setting({"loss_type": "bnpo"}),
    "dapo": Setting({"loss_type": "dapo"}),
    "dr_grpo": Setting({"loss_type": "dr_grpo"}, "constant"),
    "clip-higher": Setting(
        {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.28},
        policy_loss={"clip_low": 0.1, "clip_high": 0.28},
    ),
    "sequence ratio": Setting(
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02},
        "sequence",
        {"ratio_level": "sequence", "clip_low": 0.02, "clip_high": 0.02},
    ),
    "sequence ratio, dapo": Setting(
        {"loss_type": "dapo", "importance_sampling_level": "sequence"},
        policy_loss={"ratio_level": "sequence"},
    ),
    "kl": Setting({"loss_type": "grpo", "beta": 0.1}, "sequence"),
    "kl, dapo": Setting({"loss_type": "dapo", "beta": 0.1}),
    "kl, dr_grpo": Setting({"loss_type": "dr_grpo", "beta": 0.1}, "constant"),
    "kl times ratio": Setting(
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True}, "sequence"
    ),
    "kl, sequence ratio": Setting(
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1},
        "sequence",
        {"ratio_level": "sequence"},
    ),
    "dual clip": Setting(
        {"loss_type": "dapo", "delta": 1.5}, policy_loss={"dual_clip": 1.5}, noise=0.8
    ),
    "dual clip, sequence ratio": Setting(
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "delta": 1.25},
        "sequence",
        {"ratio_level": "sequence", "dual_clip": 1.25},
    ),
    "temperature": Setting({"loss_type": "dapo", "temperature": 0.7, "beta": 0.05}),
}


def compare(model, trainer, rollouts, setting, tolerance):
    """Loss and the gradient of every parameter, on both sides."""
    expected = trainer._compute_loss(model, rollouts)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    batch = align(rollouts)
    found = our_loss(model, batch, denominator_of([batch], setting), setting)
    found_gradients = torch.autograd.grad(found, list(model.parameters()))
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(found_gradients, expected_gradients, **tolerance)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected_gradients)


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients(tmp_path, name):
    setting, model = SETTINGS[name], make_model()
    trainer = use_float64(make_trainer(tmp_path, model, **setting.theirs))
    rollouts = make_rollouts()
    rollouts = on_policy_plus_noise(model, rollouts, setting.temperature, setting.noise)
    compare(model, trainer, rollouts, setting, EXACT)


@pytest.mark.parametrize("name", ["dual clip", "dual clip, sequence ratio", "clip-higher"])
def test_the_settings_above_clip_something(name):
    """Otherwise agreement would say nothing about clipping."""
    setting, model = SETTINGS[name], make_model()
    batch = align(on_policy_plus_noise(model, make_rollouts(), 1.0, setting.noise))
    out = clipped_policy_loss(
        our_logprobs(model, batch, 1.0),
        batch["old_logprobs"],
        batch["advantages"],
        batch["loss_mask"],
        **setting.policy_loss,
    )
    assert out.clipped_low.any()
    assert out.clipped_high.any()
    assert out.clipped_dual.any() == name.startswith("dual")


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "kl", "kl, sequence ratio"])
@pytest.mark.parametrize("case", ["tool tokens", "empty row", "on policy"])
def test_masks_and_the_first_step(tmp_path, name, case):
    """Tool output in a completion, a row without a loss token, the first step of a phase."""
    setting, model = SETTINGS[name], make_model()
    trainer = use_float64(make_trainer(tmp_path, model, **setting.theirs))
    rollouts = on_policy_plus_noise(model, make_rollouts(), 1.0, setting.noise)
    if case == "tool tokens":
        rollouts["tool_mask"] = (torch.arange(max(COMPLETION_LENGTHS)) % 3 != 1).long()[None]
        rollouts["tool_mask"] = rollouts["tool_mask"].expand_as(rollouts["completion_mask"])
    elif case == "empty row":
        rollouts["tool_mask"] = torch.ones_like(rollouts["completion_mask"])
        rollouts["tool_mask"][2] = 0
    else:
        rollouts = on_policy_plus_noise(model, make_rollouts(), 1.0, noise=0.0)
    if "tool_mask" in rollouts:
        kept = rollouts["tool_mask"] * rollouts["completion_mask"]
        rollouts["num_items_in_batch"] = kept.sum()
    compare(model, trainer, rollouts, setting, EXACT)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "kl, dapo"])
def test_gradient_accumulation(tmp_path, name):
    """Two micro-batches of an optimizer step, of uneven token counts."""
    setting, model = SETTINGS[name], make_model()
    options = {"gradient_accumulation_steps": 2, "steps_per_generation": 2}
    trainer = use_float64(make_trainer(tmp_path, model, **setting.theirs, **options))
    rollouts = on_policy_plus_noise(model, make_rollouts(), 1.0, setting.noise)
    num_items = rollouts.pop("num_items_in_batch")
    halves = [{key: value[rows] for key, value in rollouts.items()} for rows in ([0, 1], [2, 3])]
    for half in halves:
        trainer._compute_loss(model, {**half, "num_items_in_batch": num_items}).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    micro_batches = [align(half) for half in halves]
    denominator = denominator_of(micro_batches, setting)
    for batch in micro_batches:
        our_loss(model, batch, denominator, setting).backward()
    found = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("name", ["kl", "temperature", "sequence ratio"])
def test_with_its_own_fused_head_in_float32(tmp_path, name):
    """Nothing of TRL is replaced here, whose positions would count padding on the left."""
    setting, model = SETTINGS[name], make_model(torch.float32)
    trainer = make_trainer(tmp_path, model, **setting.theirs)
    rollouts = make_rollouts(torch.float32, prompt_lengths=(4, 4, 4, 4))
    rollouts = on_policy_plus_noise(model, rollouts, setting.temperature, setting.noise)
    compare(model, trainer, rollouts, setting, {"rtol": 2e-4, "atol": 2e-6})


@pytest.fixture
def float64_by_default():
    """TRL's correction n / (n - 1) is a division of integers, which has the default precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


REWARDS = [1.0, 0.0, 0.3, 0.7, 0.95, 0.95, 0.2, 0.9]
MISSING = {
    "all scored": REWARDS,
    "one missing": [1.0, 0.0, 0.3, math.nan, 0.95, 0.95, 0.2, 0.9],
    "one left": [1.0, 0.0, 0.3, math.nan, math.nan, math.nan, 0.2, 0.9],
    "none left": [math.nan] * 4 + [0.95, 0.95, 0.2, 0.9],
}


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("num_generations", [2, 4])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.usefixtures("float64_by_default")
def test_advantages(tmp_path, scale, num_generations, missing):
    """From rewards, through TRL's own pipeline."""
    rewards = torch.tensor(MISSING[missing], dtype=torch.float64)

    def rollout_func(prompts, trainer):
        ids = [[2, 3, 1]] * len(prompts)
        return {"prompt_ids": ids, "completion_ids": ids, "logprobs": [[0.0] * 3] * len(prompts)}

    trainer = make_trainer(tmp_path, make_model(), scale_rewards=scale, rollout_func=rollout_func)
    trainer.num_generations = num_generations
    trainer._calculate_rewards = lambda *args: rewards[:, None]  # it would round to float32
    output = trainer._generate_and_score_completions([{"prompt": "1"}] * len(rewards))
    found = group_advantages(
        rewards,
        torch.arange(len(rewards)) // num_generations,
        valid=~rewards.isnan(),
        scale=scale,
    )
    torch.testing.assert_close(found, output["advantages"], **EXACT)
