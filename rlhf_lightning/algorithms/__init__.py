"""The algorithms, one LightningModule a file."""

from rlhf_lightning.algorithms.grpo import (
    AdvantageConfig,
    GRPOModule,
    KLConfig,
    PolicyLossConfig,
)
from rlhf_lightning.algorithms.sft import SFTModule

__all__ = ["AdvantageConfig", "GRPOModule", "KLConfig", "PolicyLossConfig", "SFTModule"]
