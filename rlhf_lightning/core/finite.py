"""Numbers that are not finite: kept out of the weights, and out of saved files."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_lightning.core.distributed import gather_objects, rank, sum_over_ranks, world_size
from rlhf_lightning.core.metrics import PhaseMetrics


class FiniteGuard(Callback):
    """Skips an optimizer step whose loss or gradient is not finite, on all processes alike.

    Weights and optimizer state stay as they were; the step counts (``global_step`` and the
    learning-rate schedule go on), so that runs of several processes and resumed runs stay in step.
    A warning names the step and the cause. The phase's figures are those of the steps that were
    taken, and ``train/skipped_steps`` counts the others; ``train/grad_norm`` is the mean norm of
    the gradients before clipping (``SFTModule`` logs it for each step).

    Under ``16-mixed`` a gradient that overflows is how the scaler finds its scale: such steps are
    counted, but do not end the run while the scale can still fall.

    ``BaseModule`` attaches it by itself. To set the limit, give your own:
    ``Trainer(callbacks=[FiniteGuard(max_consecutive=10)])``.

    Args:
        max_consecutive: how many such steps in a row end the run.
    """

    def __init__(self, max_consecutive: int = 3) -> None:
        if max_consecutive < 1:
            raise ValueError(
                f"max_consecutive is {max_consecutive}; it must be at least 1: the number of"
                " skipped optimizer steps in a row that ends the run"
            )
        self.max_consecutive = max_consecutive
        self._consecutive = 0
        self._skipped = 0
        self._bad_losses = torch.zeros(())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new ``fit`` counts from zero."""
        if stage == "fit":
            self._consecutive = self._skipped = 0
            self._bad_losses = torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """How many steps were skipped: just before now, and in all."""
        return {"consecutive": self._consecutive, "skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from there."""
        self._consecutive, self._skipped = state_dict["consecutive"], state_dict["skipped"]

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Look at the loss of each micro-batch, without waiting for the device."""
        bad = (~torch.isfinite(loss.detach())).float()
        self._bad_losses = self._bad_losses.to(bad.device) + bad

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Agree over all processes whether this step is taken, before anything is clipped.

        Raises:
            FloatingPointError: if it is one skipped step in a row too many.
        """
        figures: PhaseMetrics = pl_module.phase_metrics  # type: ignore[assignment]
        parameters = _with_gradient(optimizer)
        norm = gradient_norm(parameters)
        faults = torch.stack([self._bad_losses, (~torch.isfinite(norm)).to(self._bad_losses)])
        bad_losses, bad_norms = sum_over_ranks(faults, pl_module.device).tolist()
        skipped = bool(bad_losses or bad_norms)
        if skipped:
            cause = self._cause(pl_module, parameters)
            self._skip(trainer, pl_module, cause, expected=not bad_losses)
            for parameter in parameters:  # optimizers pass over parameters without a gradient
                parameter.grad = None
            figures.rewind()
        else:
            self._consecutive = 0
        pl_module.log_gradient_norm(None if skipped else norm)  # type: ignore[operator]
        figures.count("train/skipped_steps", int(skipped and rank() == 0))
        self._bad_losses = torch.zeros_like(self._bad_losses)

    def _skip(
        self, trainer: Trainer, pl_module: LightningModule, cause: str, expected: bool
    ) -> None:
        """Count and report a skipped step, or end the run.

        Args:
            trainer: the trainer.
            pl_module: the module that is trained.
            cause: what was not finite.
            expected: whether it may be a gradient scaler that searches for its scale.
        """
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        expected = expected and scaler is not None and scaler.get_scale() > 1
        in_a_row = self._consecutive + (not expected)
        if in_a_row >= self.max_consecutive and not expected:
            # before anything is counted: a checkpoint that is written now repeats this step
            raise FloatingPointError(
                f"{in_a_row} optimizer steps in a row came to nothing, the last of them (step"
                f" {trainer.global_step}) because {cause}. {_advice(pl_module)}"
            )
        self._consecutive, self._skipped = in_a_row, self._skipped + 1
        rank_zero_warn(
            f"step {trainer.global_step} is skipped, because {cause}. Weights and optimizer state"
            f" stay as they are ({self._skipped} skipped so far; {self.max_consecutive} in a row"
            " end the run)"
        )

    def _cause(self, pl_module: LightningModule, parameters: list[nn.Parameter]) -> str:
        """What is wrong, and where: a loss before a gradient, then the lowest process.

        Under DDP the NaN of one process is in the gradients of all, but only in its own loss.
        """
        mine = (2, "")
        if self._bad_losses:
            mine = (0, "the loss is not finite")
        else:
            names = {parameter: name for name, parameter in pl_module.named_parameters()}
            gradients = ((names[p], p.grad) for p in parameters if p.grad is not None)
            name = first_non_finite(gradients)
            if name is not None:
                mine = (1, f"the gradient of {name} is not finite")
            elif not torch.isfinite(gradient_norm(parameters)):
                mine = (1, "the gradient is too large to square")
        causes = gather_objects(mine)
        (_, cause), who = min((found, process) for process, found in enumerate(causes))
        return f"{cause} in process {who}" if world_size() > 1 else cause


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients as one vector (over all processes, if they are ``DTensor``)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity."""
    for name, tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        # NaN and infinity survive a sum, which is far cheaper than looking at each element
        if local.is_floating_point() and not (
            torch.isfinite(local.sum()) or torch.isfinite(local).all()
        ):
            return name
    return None


def check_weights(module: nn.Module, target: object) -> None:
    """Refuse to write weights that are not finite.

    Args:
        module: its parameters are looked at (buffers may hold infinities on purpose, as masks do).
        target: the file or folder that was to be written, for the message.

    Raises:
        FloatingPointError: naming the first parameter that holds NaN or infinity.
    """
    name = first_non_finite(module.named_parameters())
    if name is not None:
        raise FloatingPointError(
            f"{target}: not written, because parameter {name} holds values that are not finite."
            " What is there already stays. Go on from an earlier checkpoint"
        )


def check_checkpoint(checkpoint: dict[str, Any], parameters: Container[str]) -> None:
    """Refuse to save weights or optimizer state that is not finite.

    Args:
        checkpoint: what is about to be saved.
        parameters: which entries of its ``state_dict`` are parameters.

    Raises:
        FloatingPointError: naming the first tensor that holds NaN or infinity.
    """
    weights = (item for item in checkpoint["state_dict"].items() if item[0] in parameters)
    name = first_non_finite(weights) or first_non_finite(_optimizer_tensors(checkpoint))
    if name is not None:
        raise FloatingPointError(
            f"the checkpoint of step {checkpoint['global_step']} is not saved, because {name} holds"
            " values that are not finite. Earlier checkpoints stay as they are: go on from one of"
            " them, with a lower learning rate or a smaller gradient_clip_val"
        )


def _optimizer_tensors(checkpoint: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for optimizer in checkpoint.get("optimizer_states", ()):
        for parameter, state in optimizer["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    yield f"the optimizer's {name} of parameter {parameter}", value


def _with_gradient(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    groups = (group["params"] for group in optimizer.param_groups)
    return [p for parameters in groups for p in parameters if p.grad is not None]


def _advice(module: LightningModule) -> str:
    name = first_non_finite(module.named_parameters())
    if name is not None:
        return f"Parameter {name} itself is not finite: go on from an earlier checkpoint"
    return (
        "The weights are finite. Lower the learning rate, set gradient_clip_val, or look at the"
        " data of these steps"
    )
