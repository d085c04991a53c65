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
        KLConfig,
        PolicyLossConfig,
        SFTModule,
    )
    from rlhf_lightning.callbacks import HFExport, RolloutCallback, SampleLogger, Throughput
    from rlhf_lightning.data import (
        ArithmeticPrompts,
        ChatOptions,
        PhaseConfig,
        PromptFile,
        PromptLimits,
        PromptSource,
        RolloutDataModule,
        SFTDataModule,
        ValidationConfig,
    )
    from rlhf_lightning.models import ModelConfig
    from rlhf_lightning.rewards import FormatReward, MathReward, RewardPolicy
    from rlhf_lightning.rollout import HFEngine, RolloutEngine
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
        "KLConfig",
        "PolicyLossConfig",
        "SFTModule",
    ),
    "callbacks": ("HFExport", "RolloutCallback", "SampleLogger", "Throughput"),
    "data": (
        "ArithmeticPrompts",
        "ChatOptions",
        "PhaseConfig",
        "PromptFile",
        "PromptLimits",
        "PromptSource",
        "RolloutDataModule",
        "SFTDataModule",
        "ValidationConfig",
    ),
    "models": ("ModelConfig",),
    "rewards": ("FormatReward", "MathReward", "RewardPolicy"),
    "rollout": ("HFEngine", "RolloutEngine"),
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
    "FormatReward",
    "GRPOModule",
    "HFEngine",
    "HFExport",
    "KLConfig",
    "MathReward",
    "ModelConfig",
    "PhaseConfig",
    "PolicyLossConfig",
    "PromptFile",
    "PromptLimits",
    "PromptSource",
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
