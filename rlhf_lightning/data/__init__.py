"""Where batches come from: data modules and the sources they read."""

from rlhf_lightning.data.arithmetic import ArithmeticPrompts
from rlhf_lightning.data.chat import ChatOptions
from rlhf_lightning.data.held_out import ValidationConfig
from rlhf_lightning.data.phase import PhaseConfig
from rlhf_lightning.data.prompts import PromptFile, PromptSource
from rlhf_lightning.data.rollout import PromptLimits, RolloutDataModule
from rlhf_lightning.data.sft import SFTDataModule

__all__ = [
    "ArithmeticPrompts",
    "ChatOptions",
    "PhaseConfig",
    "PromptFile",
    "PromptLimits",
    "PromptSource",
    "RolloutDataModule",
    "SFTDataModule",
    "ValidationConfig",
]
