"""Reinforcement learning from feedback for language models, on PyTorch Lightning.

The public names below are imported when they are first used, so that ``import rlhf_lightning`` and
the command line's ``--help`` need not wait for torch and transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_lightning.algorithms import (
        AdvantageConfig,
        GRPOModule,
        ImportanceSamplingConfig,
        KLConfig,
        PolicyLossConfig,
        ReferenceConfig,
        SFTModule,
    )
    from rlhf_lightning.callbacks import (
        FiniteGuard,
        HFExport,
        RolloutCallback,
        SampleLogger,
        Throughput,
    )
    from rlhf_lightning.data import (
        ArithmeticPrompts,
        ChatOptions,
        DynamicSampling,
        LearnabilitySampler,
        OrderedSampler,
        PhaseConfig,
        PromptFile,
        PromptFilters,
        PromptMixture,
        PromptSampler,
        PromptSource,
        RolloutDataModule,
        SFTDataModule,
        ShuffledSampler,
        ValidationConfig,
    )
    from rlhf_lightning.models import (
        ModelConfig,
    )
    from rlhf_lightning.rewards import (
        FormatReward,
        MathReward,
        OverlongPenalty,
        RewardPolicy,
    )
    from rlhf_lightning.rollout import (
        HFEngine,
        RolloutEngine,
    )
    from rlhf_lightning.types import (
        Completion,
        RewardResult,
        RolloutBatch,
        SamplingParams,
        SequenceBatch,
        Verdict,
    )

_HOMES = {
    "algorithms": (
        "AdvantageConfig",
        "GRPOModule",
        "ImportanceSamplingConfig",
        "KLConfig",
        "PolicyLossConfig",
        "ReferenceConfig",
        "SFTModule",
    ),
    "callbacks": (
        "FiniteGuard",
        "HFExport",
        "RolloutCallback",
        "SampleLogger",
        "Throughput",
    ),
    "data": (
        "ArithmeticPrompts",
        "ChatOptions",
        "DynamicSampling",
        "LearnabilitySampler",
        "OrderedSampler",
        "PhaseConfig",
        "PromptFile",
        "PromptFilters",
        "PromptMixture",
        "PromptSampler",
        "PromptSource",
        "RolloutDataModule",
        "SFTDataModule",
        "ShuffledSampler",
        "ValidationConfig",
    ),
    "models": ("ModelConfig",),
    "rewards": (
        "FormatReward",
        "MathReward",
        "OverlongPenalty",
        "RewardPolicy",
    ),
    "rollout": (
        "HFEngine",
        "RolloutEngine",
    ),
    "types": (
        "Completion",
        "RewardResult",
        "RolloutBatch",
        "SamplingParams",
        "SequenceBatch",
        "Verdict",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__version__ = "0.1.0.dev0"
__all__ = [
    "AdvantageConfig",
    "ArithmeticPrompts",
    "ChatOptions",
    "Completion",
    "DynamicSampling",
    "FiniteGuard",
    "FormatReward",
    "GRPOModule",
    "HFEngine",
    "HFExport",
    "ImportanceSamplingConfig",
    "KLConfig",
    "LearnabilitySampler",
    "MathReward",
    "ModelConfig",
    "OrderedSampler",
    "OverlongPenalty",
    "PhaseConfig",
    "PolicyLossConfig",
    "PromptFile",
    "PromptFilters",
    "PromptMixture",
    "PromptSampler",
    "PromptSource",
    "ReferenceConfig",
    "RewardPolicy",
    "RewardResult",
    "RolloutBatch",
    "RolloutCallback",
    "RolloutDataModule",
    "RolloutEngine",
    "SFTDataModule",
    "SFTModule",
    "SampleLogger",
    "SamplingParams",
    "SequenceBatch",
    "ShuffledSampler",
    "Throughput",
    "ValidationConfig",
    "Verdict",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
