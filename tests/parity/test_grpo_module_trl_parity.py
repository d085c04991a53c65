"""``GRPOModule`` against TRL's ``GRPOTrainer``, from rollouts and rewards to loss and gradients.

Both get the same prompts, completions, engine log-probabilities and rewards, make experience of
them in their own way, and compute the loss after the weights have moved a little, as they have in
the second step of a phase. All of it in float64.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from trl_grpo import EXACT, VOCABULARY, make_model, make_tokenizer, make_trainer, use_float64

from rlhf_lightning.algorithms import GRPOModule
from rlhf_lightning.types import RolloutBatch

PROMPTS = [[3, 4], [3, 4], [5, 6, 7], [5, 6, 7]]
LENGTHS, TRUNCATED = (6, 2, 9, 4), (False, False, True, False)
REWARDS = [1.0, 0.0, 0.3, 0.9]
EOS = 1


def make_completions() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]
    return [ids if cut else [*ids[:-1], EOS] for ids, cut in zip(drawn, TRUNCATED, strict=True)]


@pytest.fixture(autouse=True)
def float64_by_default():
    """TRL makes a tensor of the engine's numbers in the default precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def engine_logprobs(model: Any, mismatch: float, missing: bool) -> list[list[float]]:
    """The model's own, and off by some noise: completions of an engine that is not quite it."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for prompt, completion in zip(PROMPTS, make_completions(), strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        at = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        exact = log_p[list(at), completion]
        found.append((exact + mismatch * torch.randn(exact.shape, generator=generator)).tolist())
    if missing:
        found[0][2] = found[3][1] = math.nan
    return found


def make_batch(logprobs: list[list[float]]) -> RolloutBatch:
    rows, completions = len(PROMPTS), make_completions()
    width = max(len(p) + len(c) for p, c in zip(PROMPTS, completions, strict=True))
    batch = RolloutBatch(
        input_ids=torch.zeros(rows, width, dtype=torch.long),
        attention_mask=torch.zeros(rows, width, dtype=torch.long),
        loss_mask=torch.zeros(rows, width, dtype=torch.bool),
        rollout_logprobs=torch.zeros(rows, width),
        rewards=torch.tensor(REWARDS)[:, None],
        reward_valid=torch.ones(rows, 1, dtype=torch.bool),
        reward_weights=(1.0,),
        group_ids=torch.tensor([0, 0, 1, 1]),
        truncated=torch.tensor(TRUNCATED),
        temperature=1.0,
        policy_version=0,
    )
    for i, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        start, end = len(prompt), len(prompt) + len(completion)
        batch.input_ids[i, :end] = torch.tensor(prompt + completion)
        batch.attention_mask[i, :end] = 1
        batch.loss_mask[i, start:end] = True
        batch.rollout_logprobs[i, start:end] = torch.tensor(logprobs[i])
    return batch


def move(model: Any, by: float) -> None:
    """An optimizer step, so that ratios are not 1."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += by * torch.randn(parameter.shape, generator=generator)


def theirs(folder: Any, logprobs: list[list[float]], step: float, options: dict[str, Any]) -> Any:
    """TRL's loss and gradients, and what it has logged."""

    def rollout(prompts: Any, trainer: Any) -> dict[str, Any]:
        return {
            "prompt_ids": PROMPTS,
            "completion_ids": make_completions(),
            "logprobs": logprobs,
        }

    model = make_model()
    corrects = any(name.startswith("vllm") for name in options)
    # with two iterations TRL computes old log-probabilities, as it does for several steps a phase
    options = {"num_iterations": 2, **options}
    trainer = use_float64(make_trainer(folder, model, rollout_func=rollout, **options))
    trainer.ref_model = copy.deepcopy(model)
    trainer.use_vllm, trainer._last_loaded_step = corrects, trainer.state.global_step
    trainer._calculate_rewards = lambda *args: torch.tensor(REWARDS)[:, None]
    inputs = trainer._generate_and_score_completions([{"prompt": "1"}] * len(PROMPTS))
    move(model, step)
    loss = trainer._compute_loss(model, inputs)
    figures = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss, torch.autograd.grad(loss, list(model.parameters())), figures


def ours(logprobs: list[list[float]], step: float, options: dict[str, Any]) -> Any:
    """Our loss and gradients, and what is logged."""
    model = make_model()
    module = GRPOModule(model, make_tokenizer(), **{"kl": {"coef": 0.0}, **options})
    module.configure_model()
    module.single_update = lambda: False  # type: ignore[method-assign]
    rows = torch.arange(len(PROMPTS))
    with torch.no_grad():
        batch = module.make_experience(make_batch(logprobs), [[rows]])
    move(model, step)
    part = batch.index(rows)
    part.loss_denominator = float(module.loss_units(batch).sum())
    loss = module.training_step(part, 0)
    figures = module.phase_metrics.compute()
    return loss, torch.autograd.grad(loss, list(model.parameters())), figures


TOKEN = {"aggregation": "token"}
SEQUENCE_RATIO = {"loss_type": "grpo", "importance_sampling_level": "sequence"}


def corrected(mode: str, top: float | None, low: float | None = None, **more: Any) -> dict:
    return {
        "loss_type": "dapo",
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": top,
        "vllm_importance_sampling_clip_min": low,
        **more,
    }


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DAPO": (
        {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True},
        {"policy_loss": {**TOKEN, "clip_high": 0.28, "mask_truncated": True}},
    ),
    "Dr.GRPO": (
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {
            "policy_loss": {"aggregation": "constant", "max_completion_length": 9},
            "advantage": {"scale": "none"},
        },
    ),
    "GSPO": (
        {**SEQUENCE_RATIO, "epsilon": 3e-4, "epsilon_high": 4e-4},
        {"policy_loss": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}},
    ),
    "CISPO": (
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"policy_loss": {**TOKEN, "objective": "cispo"}},
    ),
    "CISPO, tight": (
        {"loss_type": "cispo", "epsilon_high": 1.02},
        {"policy_loss": {**TOKEN, "objective": "cispo", "clip_high": 0.02}},
    ),
    "KL and entropy": (
        {"loss_type": "dapo", "beta": 0.1, "entropy_coef": 0.05},
        {"policy_loss": {**TOKEN, "entropy_coef": 0.05}, "kl": {"coef": 0.1}},
    ),
    "token_truncate": (
        corrected("token_truncate", 1.5),
        {"policy_loss": TOKEN, "importance_sampling": {"cap": 1.5}},
    ),
    "token_truncate, both sides": (
        corrected("token_truncate", 1.2, 0.8),
        {"policy_loss": TOKEN, "importance_sampling": {"cap": 1.2, "floor": 0.8}},
    ),
    "token_mask (IcePop)": (
        corrected("token_mask", 1.5, 0.7),
        {"policy_loss": TOKEN, "importance_sampling": {"mode": "mask", "cap": 1.5, "floor": 0.7}},
    ),
    "sequence_truncate": (
        corrected("sequence_truncate", 1.5),
        {"policy_loss": TOKEN, "importance_sampling": {"level": "sequence", "cap": 1.5}},
    ),
    "sequence_mask": (
        corrected("sequence_mask", 2.0),
        {
            "policy_loss": TOKEN,
            "importance_sampling": {"mode": "mask", "level": "sequence", "cap": 2.0},
        },
    ),
    "all of it": (
        corrected(
            "token_truncate", 1.5, loss_type="cispo", epsilon_high=1.1, beta=0.1, entropy_coef=0.05,
            mask_truncated_completions=True,
        ),
        {
            "policy_loss": {
                **TOKEN, "objective": "cispo", "clip_high": 0.1, "mask_truncated": True,
                "entropy_coef": 0.05,
            },
            "kl": {"coef": 0.1},
            "importance_sampling": {"cap": 1.5},
        },
    ),
}  # fmt: skip


SAME_FIGURES = (
    "entropy",
    "kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_max",
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
)


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_gradients_and_figures(name: str, tmp_path: Any) -> None:
    their_options, our_options = SETTINGS[name]
    corrects = "importance_sampling" in our_options
    step = -1e-3 if name == "GSPO" else 0.01
    for missing in (False, True)[: 1 + corrects]:
        logprobs = engine_logprobs(make_model(), 0.4, missing)
        loss, gradients, logged = theirs(tmp_path, logprobs, step, their_options)
        our_loss, our_gradients, figures = ours(logprobs, step, our_options)
        torch.testing.assert_close(our_loss, loss, **EXACT)
        torch.testing.assert_close(our_gradients, gradients, **EXACT)
        assert any(gradient.abs().max() > 1e-3 for gradient in gradients)
        for figure in set(SAME_FIGURES) & set(logged):
            if name == "GSPO" and figure.endswith("_mean"):
                continue  # there TRL counts completions, and we count tokens everywhere
            # TRL takes the mean of flags in single precision
            assert figures[f"train/{figure}"] == pytest.approx(logged[figure], rel=1e-6), figure
        if corrects:
            tokens = sum(LENGTHS)
            if our_options["policy_loss"].get("mask_truncated"):
                tokens -= sum(n for n, cut in zip(LENGTHS, TRUNCATED, strict=True) if cut)
            share = 2 * missing / tokens
            assert figures["train/sampling/frac_missing_logprobs"] == pytest.approx(share)
            assert 0 < figures["train/sampling/importance_sampling_ratio/out_of_bounds"] < 1
        else:
            assert figures["train/clip_ratio/region_mean"] < 1
        if name in ("GSPO", "CISPO, tight"):
            assert figures["train/clip_ratio/region_mean"] > 0
