"""Callbacks that users plug in."""

from rlhf_lightning.callbacks.hf_export import HFExport
from rlhf_lightning.callbacks.sample_logger import SampleLogger
from rlhf_lightning.callbacks.throughput import Throughput
from rlhf_lightning.core.finite import FiniteGuard
from rlhf_lightning.events import RolloutCallback

__all__ = ["FiniteGuard", "HFExport", "RolloutCallback", "SampleLogger", "Throughput"]
