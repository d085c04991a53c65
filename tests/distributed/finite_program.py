"""What the test of numbers that are not finite runs: `finite_program.py FOLDER DEVICES`.

The last process spoils the loss of one micro-batch, and later those of three steps in a row.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, seed_everything
from tiny import quiet_trainer, sequences, sft


class Poison(Callback):
    """Spoils what the last process alone sees: the loss, but not the gradients that it gives."""

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        at = (trainer.current_epoch, trainer.fit_loop.batch_idx)
        if trainer.global_rank == trainer.world_size - 1 and at in [(0, 2), (2, 1), (2, 3), (2, 5)]:
            loss.data.fill_(float("nan"))


def main() -> None:
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    module = sft(optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9))
    trainer = quiet_trainer(
        folder,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision="64-true",
        max_epochs=3,
        accumulate_grad_batches=2,
        callbacks=[Poison(), Figures()],
    )
    error = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, sequences())
        except FloatingPointError as found:
            error = str(found)
    found = [str(warning.message) for warning in caught if "is skipped" in str(warning.message)]
    end = {"weights": module.state_dict(), "figures": FIGURES, "error": error, "warned": found}
    torch.save(end, folder / f"rank{trainer.global_rank}.pt")


FIGURES: list[dict[str, float]] = []


class Figures(Callback):
    """Keeps the figures of each epoch."""

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        names = ("train/skipped_steps", "train/grad_norm_epoch", "train/loss_epoch")
        FIGURES.append({name: float(trainer.callback_metrics[name]) for name in names})


if __name__ == "__main__":
    main()
