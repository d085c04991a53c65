"""Where batches come from: data modules and the sources they read."""

from rlhf_lightning.data.arithmetic import ArithmeticPrompts
from rlhf_lightning.data.chat import ChatOptions
from rlhf_lightning.data.filters import PromptFilters
from rlhf_lightning.data.held_out import ValidationConfig
from rlhf_lightning.data.mixture import PromptMixture
from rlhf_lightning.data.phase import DynamicSampling, PhaseConfig
from rlhf_lightning.data.prompts import PromptFile, PromptSource
from rlhf_lightning.data.rollout import RolloutDataModule
from rlhf_lightning.data.samplers import (
    LearnabilitySampler,
    OrderedSampler,
    PromptSampler,
    ShuffledSampler,
)
from rlhf_lightning.data.sft import SFTDataModule

__all__ = [
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
]
