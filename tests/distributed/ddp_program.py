"""What the two-process tests run: `python ddp_program.py FOLDER MODE DEVICES [CHECKPOINT]`."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Sums, grpo, quiet_trainer, rollouts, sequences, sft, tiny_model

from rlhf_lightning.algorithms import AdvantageConfig, GRPOModule, PolicyLossConfig
from rlhf_lightning.data import PhaseConfig, ValidationConfig
from rlhf_lightning.rollout.engine import RolloutEngine
from rlhf_lightning.types import Completion


class ScriptedEngine(RolloutEngine):
    """Completions that follow from the prompt's seed alone, of very different lengths."""

    def bind(self, model: Any, tokenizer: Any) -> None:
        self.version = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Any,
        *,
        seeds: Sequence[int],
        on_progress: Any = None,
    ) -> list[list[Completion]]:
        groups = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            draw, group = random.Random(seed), []
            for _ in range(sampling.n):
                length = draw.choice([1, 1, 2, 12])
                ids = [draw.randrange(3, 13) for _ in range(length)]
                group.append(Completion(list(prompt), ids, [-1.0] * length, "length"))
            groups.append(group)
        return groups

    def update_weights(self, named_parameters: Iterable, version: int) -> None:
        self.version = version

    def close(self) -> None:
        pass


def ragged_reward(completions: list[str], **kwargs: Any) -> list[float | None]:
    """Uneven on purpose: some rows have no score, so ranks have different numbers of them."""
    return [
        None if text.startswith("7") else float(text.count("1") + len(text)) for text in completions
    ]


def make(mode: str) -> tuple[Any, Any, dict[str, Any]]:
    sgd = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5)}
    if mode.startswith("grpo"):
        aggregation = mode.removeprefix("grpo-")
        how = PolicyLossConfig(
            aggregation=aggregation, max_completion_length=12 if aggregation == "constant" else None
        )
        scale = AdvantageConfig(scale="batch") if aggregation == "token" else None
        options = {"policy_loss": how, "advantage": scale, **sgd}
        data = rollouts(
            engine=ScriptedEngine(),
            rewards=[ragged_reward],
            phase=PhaseConfig(prompts=6, steps=1, update_epochs=2),
            validation=ValidationConfig(Sums(7), batch_size=3),
        )
        return grpo(**options), data, {"max_epochs": 2, "accumulate_grad_batches": 2}
    if mode == "sft":
        return (
            sft(**sgd),
            sequences(validation=Sums(7)),
            {"max_epochs": 2, "accumulate_grad_batches": 2},
        )
    assert mode == "resume"
    module = GRPOModule(tiny_model(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    return module, rollouts(steps=2, update_epochs=2), {"max_epochs": 3}


def main() -> None:
    folder, mode, devices = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    checkpoint = sys.argv[4] if len(sys.argv) > 4 else None
    torch.set_num_threads(1)
    seed_everything(0 if checkpoint is None else 5, verbose=False)
    module, data, options = make(mode)
    callbacks = []
    if mode == "resume":
        callbacks = [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)]
    trainer = quiet_trainer(
        folder,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision="32-true" if mode == "resume" else "64-true",
        callbacks=callbacks,
        **options,
    )
    trainer.fit(module, data, ckpt_path=checkpoint)
    if trainer.is_global_zero:
        figures = {k: float(v) for k, v in trainer.callback_metrics.items()}
        name = "end.pt" if checkpoint is None else "resumed.pt"
        end = {"weights": module.state_dict(), "figures": figures, "step": trainer.global_step}
        torch.save(end, folder / name)


if __name__ == "__main__":
    main()
