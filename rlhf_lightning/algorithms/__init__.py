"""The algorithms, one LightningModule a file."""

from rlhf_lightning.algorithms._grpo_options import (
    AdvantageConfig,
    ImportanceSamplingConfig,
    KLConfig,
    PolicyLossConfig,
)
from rlhf_lightning.algorithms._policy_gradient import ReferenceConfig
from rlhf_lightning.algorithms.grpo import GRPOModule
from rlhf_lightning.algorithms.sft import SFTModule

__all__ = [
    "AdvantageConfig",
    "GRPOModule",
    "ImportanceSamplingConfig",
    "KLConfig",
    "PolicyLossConfig",
    "ReferenceConfig",
    "SFTModule",
]
