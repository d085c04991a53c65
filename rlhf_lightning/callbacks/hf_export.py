"""The trained model as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.core.module import BaseModule


class HFExport(Callback):
    """Writes the model (safetensors) and its tokenizer when fitting ends.

    ``AutoModelForCausalLM.from_pretrained(folder)`` loads it, and so does ``model: folder`` of the
    next recipe. The folder appears complete or not at all.

    Args:
        folder: where to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check, before any compute, that there is something to export and a place for it.

        Raises:
            TypeError: if the module is none of this package's language-model modules.
            OSError: if the folder cannot be made.
        """
        if not isinstance(pl_module, BaseModule):
            raise TypeError(f"HFExport cannot export a {type(pl_module).__name__}")
        if stage == "fit":
            self.folder.parent.mkdir(parents=True, exist_ok=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder on rank 0."""
        assert isinstance(pl_module, BaseModule)
        if trainer.is_global_zero:
            pl_module.export(self.folder)
        trainer.strategy.barrier("HFExport")
