"""What GRPO's options do in a run: masking, importance sampling, the entropy bonus, refusals."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny import Sums, grpo, quiet_trainer, rollouts, tiny_model

from rlhf_lightning.algorithms import GRPOModule, KLConfig
from rlhf_lightning.events import RolloutCallback
from rlhf_lightning.rollout import HFEngine
from rlhf_lightning.rollout.engine import RolloutEngine
from rlhf_lightning.types import Completion, SamplingParams

NO_KL = KLConfig(coef=0.0)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


class Parrot(RolloutEngine):
    """Answers a prompt in the same way every time, whatever the seed and the weights."""

    def __init__(self, truncated: float = 0.5) -> None:
        self.truncated = truncated

    def bind(self, model: Any, tokenizer: Any) -> None:
        """Nothing to learn."""

    def generate(
        self, prompts: Any, sampling: Any, *, seeds: Any, on_progress: Any = None
    ) -> list[list[Completion]]:
        return [[self._answer(prompt, i) for i in range(sampling.n)] for prompt in prompts]

    def _answer(self, prompt: list[int], sample: int) -> Completion:
        draw = random.Random(repr((list(prompt), sample)))
        ids = [draw.randrange(3, 13) for _ in range(draw.randrange(1, 5))]
        reason = "length" if draw.random() < self.truncated else "stop"
        return Completion(list(prompt), ids, [-2.0] * len(ids), reason)

    def update_weights(self, named_parameters: Any, version: int) -> None:
        """It never changes."""

    def close(self) -> None:
        """Nothing is open."""


def ragged(completions: list[str], **columns: Any) -> list[float]:
    return [float(text.count("1")) + len(text) / 3 for text in completions]


class Phases(Callback):
    """The figures of every phase, and the losses of every micro-batch."""

    def __init__(self) -> None:
        self.figures: list[dict[str, float]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        figures = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.figures += [figures] if figures else []


def run(
    folder: Path, module: Any, data: Any, epochs: int = 1, callbacks: Any = (), **options: Any
) -> tuple[dict[str, torch.Tensor], Phases]:
    """Weights after a run, and what was logged."""
    phases = Phases()
    options = {"max_epochs": epochs, "callbacks": [phases, *callbacks], **options}
    quiet_trainer(folder, **options).fit(module, data)
    return module.state_dict(), phases


# Truncated completions


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_truncated_completions_count_in_their_group_but_not_in_the_loss(
    aggregation: str, tmp_path: Path
) -> None:
    """As if their advantage were 0 and the denominator were that of the others."""
    kept: list[Any] = []

    class ByHand(RolloutCallback):
        def on_rollout_end(self, trainer, pl_module, batch, samples, metrics) -> None:
            assert 0 < batch.truncated.sum() < len(batch)
            units = {
                "token": batch.loss_mask.sum(dim=1),
                "sequence": torch.ones(len(batch)),
                "constant": torch.full((len(batch),), 4),
            }[aggregation].double()
            kept.append((units[~batch.truncated].sum() / units.sum(), batch.advantages.clone()))
            if not pl_module.policy_loss.mask_truncated:
                batch.advantages[batch.truncated] = 0

    ends, losses = [], []
    for masked in (True, False):
        how = {"aggregation": aggregation, "mask_truncated": masked}
        if aggregation == "constant":
            how["max_completion_length"] = 4
        # without masking the denominator is larger, which a larger step undoes
        rate = 0.1 if masked else 0.1 / float(kept[0][0])
        module = grpo(
            policy_loss=how, kl=NO_KL, optimizer=lambda p, lr=rate: torch.optim.SGD(p, lr=lr)
        )
        data = rollouts(steps=1, engine=Parrot(), rewards=[ragged])
        end, phases = run(tmp_path, module, data, callbacks=[ByHand()], precision="64-true")
        ends.append(end)
        losses.append(phases.losses[0])
    assert torch.equal(kept[0][1], kept[1][1])
    assert (kept[0][1] != 0).any()
    assert losses[0] == pytest.approx(losses[1] / float(kept[0][0]), rel=1e-9)
    for name, value in ends[0].items():  # Llama's norm is float32, whatever the model is
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-8)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_where_everything_was_truncated_the_loss_is_0_and_nothing_moves(
    aggregation: str, tmp_path: Path
) -> None:
    """P2-29: with gradients of exactly 0, not without any."""
    gradients: list[Any] = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            gradients.extend(p.grad for p in pl_module.parameters())

    how = {"aggregation": aggregation, "mask_truncated": True, "entropy_coef": 0.1}
    module = grpo(policy_loss=how, optimizer=sgd)
    data = rollouts(engine=Parrot(truncated=1.0), rewards=[ragged])
    with pytest.warns(UserWarning, match=r"it trains nothing\. Raise sampling\.max_new_tokens"):
        _, phases = run(tmp_path, module, data, callbacks=[Watch()], accumulate_grad_batches=2)
    assert phases.losses == [0.0] * 4
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    (figures,) = phases.figures
    assert figures["rollout/reward_std"] > 0
    assert all(math.isfinite(value) for value in figures.values())
    assert "train/clip_ratio/low_min" not in figures


# The difference between engine and trainer


class Boastful(HFEngine):
    """Claims twice the probability that its tokens had, and nothing at all of some."""

    def generate(self, *args: Any, **kwargs: Any) -> list[list[Completion]]:
        groups = super().generate(*args, **kwargs)
        for completion in (c for group in groups for c in group):
            completion.logprobs = [logprob + math.log(2) for logprob in completion.logprobs]
        return groups


class Forgetful(HFEngine):
    """Does not know the probability of any completion's first token."""

    def generate(self, *args: Any, **kwargs: Any) -> list[list[Completion]]:
        groups = super().generate(*args, **kwargs)
        for completion in (c for group in groups for c in group):
            completion.logprobs[0] = math.nan
        return groups


class Lengths(RolloutCallback):
    """The lengths of the completions of each phase."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_rollout_end(self, trainer, pl_module, batch, samples, metrics) -> None:
        self.seen.append(batch.loss_mask.sum(dim=1))


RATIO = "train/sampling/importance_sampling_ratio"


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_an_engine_that_shares_the_weights_has_weights_of_1(
    precision: str, temperature: float, tmp_path: Path
) -> None:
    """R30: the temperature is on both sides."""
    sampling = SamplingParams(n=4, max_new_tokens=4, temperature=temperature)
    module = grpo(importance_sampling={}, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    data = rollouts(sampling=sampling)
    _, phases = run(tmp_path, module, data, epochs=2, precision=precision)
    tolerance = 1e-5 if precision == "32-true" else 0.1
    for figures in phases.figures:
        for name in ("min", "mean", "max"):
            assert figures[f"{RATIO}/{name}"] == pytest.approx(1.0, abs=tolerance)
        assert figures[f"{RATIO}/out_of_bounds"] == 0.0


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tokens_weigh_less_where_the_engine_claims_more(
    level: str, steps: int, tmp_path: Path
) -> None:
    """Half by token, half for each token by sequence; with one step a phase or several."""
    lengths, losses = Lengths(), []
    for weighted in ({"level": level}, None):
        module = grpo(
            policy_loss={"aggregation": "token"},  # where advantages do not cancel each other
            importance_sampling=weighted,
            kl=NO_KL,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        )
        data = rollouts(steps=steps, engine=Boastful(), rewards=[ragged])
        _, phases = run(tmp_path, module, data, callbacks=[lengths], precision="64-true")
        losses.append(phases.losses)
        (figures,) = phases.figures
        assert figures["train/sampling/sampling_logp_difference/mean"] == pytest.approx(
            math.log(2), rel=1e-5
        )
        if weighted:
            least = 0.5 if level == "token" else 0.5 ** int(lengths.seen[0].max())
            assert figures[f"{RATIO}/min"] == pytest.approx(least, rel=1e-5)
        else:
            assert f"{RATIO}/min" not in figures
    assert max(abs(loss) for loss in losses[1]) > 1e-2
    if level == "token":
        assert losses[0] == pytest.approx([loss / 2 for loss in losses[1]], rel=1e-4, abs=1e-7)
    else:
        assert losses[0] != pytest.approx(losses[1], rel=0.4)


def test_unknown_probabilities_are_counted_and_change_nothing(tmp_path: Path) -> None:
    """R31. A share of the tokens: the same however often a phase is gone through."""
    ends = []
    for engine in (Forgetful(), HFEngine()):
        module, lengths = grpo(importance_sampling={"level": "sequence"}, optimizer=sgd), Lengths()
        data = rollouts(engine=engine, rewards=[ragged], update_epochs=2)
        end, phases = run(tmp_path, module, data, callbacks=[lengths])
        ends.append(end)
        (figures,) = phases.figures
        share = 16 / int(lengths.seen[0].sum()) * isinstance(engine, Forgetful)
        assert figures["train/sampling/frac_missing_logprobs"] == pytest.approx(share)
        assert figures["train/sampling/sampling_logp_difference/max"] < 1e-5
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_probabilities_of_a_cut_distribution_are_not_compared(cut: Any, tmp_path: Path) -> None:
    """R30: they are normalised over fewer tokens than the trainer's."""
    (name,) = cut
    sampling = SamplingParams(n=4, max_new_tokens=4, **cut)
    with pytest.raises(ValueError, match=f"importance_sampling is on while sampling has {name}="):
        run(tmp_path, grpo(importance_sampling={}), rollouts(sampling=sampling))
    _, phases = run(tmp_path, grpo(), rollouts(sampling=sampling))
    assert not [name for name in phases.figures[0] if name.startswith("train/sampling/")]


# The entropy bonus


def test_the_entropy_bonus_alone_makes_the_policy_more_random(tmp_path: Path) -> None:
    def indifferent(completions: list[str], **columns: Any) -> list[float]:
        return [0.5] * len(completions)

    how = {"aggregation": "token", "entropy_coef": 0.2}
    module = GRPOModule(tiny_model(initializer_range=0.2), policy_loss=how, kl=NO_KL, optimizer=sgd)
    data = rollouts(steps=1, engine=Parrot(), rewards=[indifferent], prompts=Sums(4))
    _, phases = run(tmp_path, module, data, epochs=8)
    entropies = [figures["train/entropy"] for figures in phases.figures]
    assert entropies == sorted(entropies)
    assert entropies[-1] > entropies[0] + 0.005
    for figures in phases.figures:
        assert figures["train/policy_loss"] == 0.0
        expected = -0.2 * figures["train/entropy"]
        assert figures["train/loss"] == pytest.approx(expected, rel=1e-5)


# Together


def test_at_learning_rate_0_every_figure_stays_what_it_is(tmp_path: Path) -> None:
    """R33, with all options on: the same answers to the same prompts, over 50 steps."""
    module = grpo(
        policy_loss={"objective": "cispo", "mask_truncated": True, "entropy_coef": 0.1},
        importance_sampling={"mode": "mask", "floor": 0.5},
        reference={"ema_decay": 0.5},
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.0),
    )
    data = rollouts(engine=Parrot(), rewards=[ragged], prompts=Sums(4), steps=1, update_epochs=2)
    _, phases = run(tmp_path, module, data, epochs=25)
    assert len(phases.figures) == 25
    first = phases.figures[0]
    assert first["train/kl"] == 0.0
    assert 0 < first[f"{RATIO}/out_of_bounds"] < 1
    for figures in phases.figures[1:]:
        assert figures.keys() == first.keys()
        for name in (name for name in first if not name.startswith("time/")):
            assert figures[name] == pytest.approx(first[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_loss": {"objective": "cispo", "dual_clip": 9.0}}, "objective is 'cispo' with"),
        ({"policy_loss": {"objective": "cispo", "ratio": "sequence"}}, "ratio 'sequence'"),
        ({"policy_loss": {"objective": "ppo"}}, "policy_loss.objective is 'ppo'"),
        ({"policy_loss": {"entropy_coef": -0.1}}, "entropy_coef is -0.1"),
        ({"importance_sampling": {"cap": 0.5}}, r"importance_sampling.floor is 0.0 and cap 0.5"),
        ({"importance_sampling": {"floor": -1.0}}, r"importance_sampling.floor is -1.0"),
        ({"importance_sampling": {"mode": "clip"}}, "importance_sampling.mode is 'clip'"),
        ({"reference": {"refresh_every": 0}}, "reference.refresh_every is 0"),
        ({"reference": {"ema_decay": 1.0}}, "reference.ema_decay is 1.0"),
        ({"reference": {"ema_decay": 0.9}, "kl": {"coef": 0.0}}, "kl.coef is 0"),
        (
            {"policy_loss": {"mask_truncated": True}, "kl": {"placement": "reward"}},
            "kl.placement is 'reward'",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: Any, message: str) -> None:
    """R40."""
    with pytest.raises(ValueError, match=message):
        grpo(**options)


def test_bounds_follow_the_objective() -> None:
    clip, cispo = grpo().policy_loss, grpo(policy_loss={"objective": "cispo"}).policy_loss
    assert (clip.clip_low, clip.clip_high) == (0.2, 0.2)
    assert (cispo.clip_low, cispo.clip_high) == (1.0, 4.0)
