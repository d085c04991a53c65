"""Rollouts: engines that generate completions, and what is done with them."""

from rlhf_lightning.rollout.collector import RolloutCollector, Rollouts
from rlhf_lightning.rollout.engine import RolloutEngine
from rlhf_lightning.rollout.hf import HFEngine

__all__ = ["HFEngine", "RolloutCollector", "RolloutEngine", "Rollouts"]
