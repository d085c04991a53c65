"""The plain data that the layers of the package hand to each other.

Notation in shapes: ``B`` rows, ``T`` tokens (padded), ``R`` reward functions.

Every ``[B, T]`` tensor of a batch is aligned with ``input_ids``: position ``t`` speaks about token
``input_ids[:, t]`` (its log-probability given the tokens before it, whether it counts in the loss).
Position 0 has nothing before it and never counts. Rows are padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

BatchT = TypeVar("BatchT", bound="Batch")


class Verdict(str, Enum):
    """What a reward function found, apart from the score.

    The first six are the model's doing and carry a score (0 unless configured); the others are
    faults of the machinery or rows that a function does not judge, and never carry one.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    TOO_LONG = "too_long"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"
    CRASH = "crash"
    GOLD_UNPARSEABLE = "gold_unparseable"
    SANDBOX_ERROR = "sandbox_error"
    ENDPOINT_ERROR = "endpoint_error"
    REFUSED = "refused"
    NOT_APPLICABLE = "not_applicable"

    @property
    def is_scored(self) -> bool:
        """Whether this verdict is the model's doing, so that the row has a score."""
        return self in _SCORED

    @property
    def code(self) -> int:
        """Position in the enum: how a verdict is written into a tensor (``-1`` is "none given")."""
        return _INDEX[self]


_SCORED = frozenset(
    {
        Verdict.CORRECT,
        Verdict.WRONG,
        Verdict.NO_ANSWER,
        Verdict.TOO_LONG,
        Verdict.TIMEOUT,
        Verdict.OUT_OF_MEMORY,
    }
)
_INDEX = {verdict: i for i, verdict in enumerate(Verdict)}


@dataclass(frozen=True)
class RewardResult:
    """One reward function's finding about one completion.

    Attributes:
        score: the reward, or None for "no score" (left out of every sum and mean, and counted).
        verdict: why, where the function says so.
        details: strings and numbers worth keeping beside the sample (the extracted answer, ...).
    """

    score: float | None
    verdict: Verdict | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn.

    Args:
        n: completions per prompt (the group size G of GRPO).
        max_new_tokens: the longest completion, EOS included.
        temperature: divides the logits; 0 is greedy decoding.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
        min_p: drop tokens less likely than this times the most likely one; 0 keeps all.
        stop_token_ids: token ids that end a completion beside the model's own EOS ids.
    """

    n: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks = {
            "n": (self.n >= 1, "at least 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1)"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"sampling.{name} is {getattr(self, name)!r}; it must be {wanted}")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"sampling.temperature is 0 (greedy) with n={self.n}: the {self.n} completions of a"
                " prompt would be the same. Set n to 1 or raise the temperature"
            )
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))


@dataclass
class Completion:
    """One sampled completion, as plain data.

    Attributes:
        prompt_ids: the ids that the engine was given.
        token_ids: the sampled ids, the EOS or stop token included.
        logprobs: log-probability of each sampled token under the sampling distribution (after
            temperature, top-k, top-p and min-p). Under greedy decoding, that of temperature 1.
        finish_reason: ``"stop"`` (EOS or a stop token), ``"length"`` or ``"abort"``.
        weight_versions: ``(version, start, end)``: whose weights wrote ``token_ids[start:end]``.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    weight_versions: list[tuple[int, int, int]] = field(default_factory=list)


ProgressFn = Callable[[int, int], None]
"""Called with (finished completions, all completions) while rollouts are collected."""


class RewardFunction(Protocol):
    """TRL's reward signature, sync or async.

    It is called with keywords: ``prompts`` and ``completions`` (strings, or message lists where the
    data set is conversational), ``completion_ids``, every other column of the rows, and
    ``trainer_state``, ``log_extra``, ``log_metric``. A function takes what it wants of them and
    swallows the rest with ``**kwargs``.
    """

    def __call__(
        self, *, prompts: list[Any], completions: list[Any], **kwargs: Any
    ) -> Sequence[float | RewardResult | None]:
        """One score, ``RewardResult`` or None ("not applicable") for each completion."""
        ...


class Batch:
    """A bag of tensors with named fields.

    Deliberately neither a dict nor a dataclass: Lightning casts the floating-point tensors of those
    to the training precision, which would round log-probabilities and advantages under
    ``bf16-true``. ``None`` marks a field that this batch does not have.

    A subclass lists its fields: ``row_fields`` are tensors whose first dimension is the row, of
    which ``token_fields`` have the token dimension second; ``scalar_fields`` are plain numbers.
    """

    row_fields: ClassVar[tuple[str, ...]] = ()
    token_fields: ClassVar[frozenset[str]] = frozenset()
    scalar_fields: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **fields: Any) -> None:
        known = (*self.row_fields, *self.scalar_fields, "auxiliary")
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise TypeError(f"{type(self).__name__} has no field {unknown}; it has {list(known)}")
        self.auxiliary: Batch | None = None
        for name in known:
            setattr(self, name, fields.get(name))

    def __len__(self) -> int:
        return int(getattr(self, self.row_fields[0]).shape[0])

    def _with(self: BatchT, change: Callable[[str, Tensor], Tensor]) -> BatchT:
        new = type(self)(**{name: getattr(self, name) for name in self.scalar_fields})
        for name in self.row_fields:
            value = getattr(self, name)
            setattr(new, name, None if value is None else change(name, value))
        return new

    def to(self: BatchT, device: torch.device | str, non_blocking: bool = False) -> BatchT:
        """The same batch on another device (the hook by which Lightning moves batches)."""
        new = self._with(lambda _, value: value.to(device, non_blocking=non_blocking))
        if self.auxiliary is not None:
            new.auxiliary = self.auxiliary.to(device, non_blocking)
        return new

    def index(self: BatchT, rows: Tensor) -> BatchT:
        """The given rows, with columns that are padding in all of them cut off."""
        new = self._with(lambda _, value: value[rows])
        attention_mask: Tensor | None = getattr(new, "attention_mask", None)
        if attention_mask is None or len(rows) == 0:
            return new
        length = max(int(attention_mask.sum(dim=1).max()), 1)
        return new._with(
            lambda name, value: value[:, :length] if name in self.token_fields else value
        )

    def as_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, fit for a checkpoint; fields that are None are left out."""
        names = (*self.row_fields, *self.scalar_fields)
        fields = {name: getattr(self, name) for name in names}
        return {name: value for name, value in fields.items() if value is not None}


class SequenceBatch(Batch):
    """Token sequences with a loss mask: what supervised fine-tuning trains on.

    Fields:
        input_ids: ``[B, T]`` int64, padded on the right.
        attention_mask: ``[B, T]`` int64, 1 on tokens and 0 on padding.
        loss_mask: ``[B, T]`` bool, True where the token counts in the loss.
        loss_denominator: see :class:`RolloutBatch`.
    """

    row_fields = ("input_ids", "attention_mask", "loss_mask")
    token_fields = frozenset(row_fields)
    scalar_fields = ("loss_denominator",)

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    loss_denominator: float | None


class RolloutBatch(Batch):
    """Completions of the policy, scored.

    Fields:
        input_ids, attention_mask: ``[B, T]`` int64, prompt and completion, padded on the right.
        loss_mask: ``[B, T]`` bool, True on sampled tokens (an EOS that the model wrote included).
        rollout_logprobs: ``[B, T]`` float32, the engine's, under the sampling distribution.
        old_logprobs: ``[B, T]`` float32, the trainer's at the time of the rollout.
        ref_logprobs: ``[B, T]`` float32, the frozen reference model's.
        advantages: ``[B, T]`` float32.
        rewards: ``[B, R]`` float32, 0 where ``reward_valid`` is False.
        reward_valid: ``[B, R]`` bool, False where a function gave no score.
        verdicts: ``[B, R]`` int64, ``Verdict.code`` or -1.
        step_rewards, step_ends: ``[B, T]``, process rewards and the last token of each step.
        group_ids: ``[B]`` int64, the same for completions of the same prompt.
        truncated: ``[B]`` bool, True where the length limit ended the completion.
        valid: ``[B]`` bool, False on rows that only keep ranks in step (validation).
        reward_names, reward_weights: tuples of length R.
        temperature: the sampling temperature, to be applied to the trainer's logits as well.
        policy_version: the phase whose weights wrote the completions.
        loss_denominator: what every loss sum of the micro-batch is divided by: the units (tokens,
            sequences) of the whole optimizer step over all ranks, divided by the number of
            micro-batches in the step and by the world size, because Lightning divides the loss by
            the former and DDP averages gradients over the latter.
        samples: one record a row, of plain values (validation and prediction only).
    """

    row_fields = (
        "input_ids",
        "attention_mask",
        "loss_mask",
        "rollout_logprobs",
        "old_logprobs",
        "ref_logprobs",
        "advantages",
        "rewards",
        "reward_valid",
        "verdicts",
        "step_rewards",
        "step_ends",
        "group_ids",
        "truncated",
        "valid",
    )
    token_fields = frozenset(
        {
            "input_ids",
            "attention_mask",
            "loss_mask",
            "rollout_logprobs",
            "old_logprobs",
            "ref_logprobs",
            "advantages",
            "step_rewards",
            "step_ends",
        }
    )
    scalar_fields = (
        "reward_names",
        "reward_weights",
        "temperature",
        "policy_version",
        "loss_denominator",
        "samples",
    )

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    rollout_logprobs: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    advantages: Tensor | None
    rewards: Tensor
    reward_valid: Tensor
    verdicts: Tensor
    step_rewards: Tensor | None
    step_ends: Tensor | None
    group_ids: Tensor
    truncated: Tensor
    valid: Tensor | None
    reward_names: tuple[str, ...]
    reward_weights: tuple[float, ...]
    temperature: float
    policy_version: int
    loss_denominator: float | None
    samples: list[dict[str, Any]] | None


StepPlan = list[list[Tensor]]
"""``plan[s][a]``: row indices of micro-batch ``a`` of optimizer step ``s``."""


@runtime_checkable
class ExperienceMaker(Protocol):
    """What a module must offer so that a ``RolloutDataModule`` can train it."""

    def make_experience(self, batch: RolloutBatch, plan: StepPlan) -> RolloutBatch:
        """Add what the loss needs (old and reference log-probabilities, advantages).

        Args:
            batch: this rank's rollouts of the phase.
            plan: the micro-batches of update epoch 0. Old log-probabilities are computed on exactly
                these, so that the first ratio is exactly 1.
        """
        ...

    def loss_units(self, batch: RolloutBatch) -> Tensor:
        """``[B]``: what each row adds to the loss denominator (its tokens, 1, a constant)."""
        ...
