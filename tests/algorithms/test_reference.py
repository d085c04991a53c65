"""A reference that follows the policy, and stays exact through checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import grpo, quiet_trainer, rollouts

from rlhf_lightning.algorithms import ReferenceConfig
from rlhf_lightning.events import RolloutCallback


def flat(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().clone().flatten() for p in module.parameters()])


class Weights(Callback):
    """The policy's weights when a phase starts, and the reference's when it is scored."""

    def __init__(self) -> None:
        self.policies: list[torch.Tensor] = []
        self.references: list[torch.Tensor] = []

    def on_rollout_start(self, trainer: Any, pl_module: Any, phase: int) -> None:
        self.policies.append(flat(pl_module.policy))

    def on_rollout_end(self, trainer, pl_module, batch, samples, metrics) -> None:
        self.references.append(flat(pl_module.frozen["reference"]))


def fit(
    folder: Path, epochs: int = 5, callbacks: Any = (), ckpt: str | None = None, **how: Any
) -> Weights:
    weights = Weights()
    trainer = quiet_trainer(folder, max_epochs=epochs, callbacks=[weights, *callbacks])
    trainer.fit(grpo(**how), rollouts(), ckpt_path=ckpt)
    return weights


def test_it_becomes_the_policy_every_n_phases(tmp_path: Path) -> None:
    weights = fit(tmp_path, reference={"refresh_every": 2})
    for phase, source in enumerate([0, 0, 2, 2, 4]):
        assert torch.equal(weights.references[phase], weights.policies[source]), phase
    assert not torch.equal(weights.policies[0], weights.policies[2])


@pytest.mark.parametrize(("every", "moves"), [(None, {1, 2, 3, 4}), (3, {3})])
def test_it_moves_by_an_average(every: int | None, moves: set[int], tmp_path: Path) -> None:
    how = ReferenceConfig(refresh_every=every, ema_decay=0.75)
    weights = fit(tmp_path, reference=how)
    expected = weights.policies[0]
    for phase in range(5):
        if phase in moves:
            expected = 0.75 * expected + 0.25 * weights.policies[phase]
        torch.testing.assert_close(weights.references[phase], expected, rtol=1e-5, atol=1e-7)


def test_the_kl_starts_from_0_after_a_refresh(tmp_path: Path) -> None:
    figures: list[float] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 0:
                gap = batch.ref_logprobs - batch.old_logprobs
                figures.append(float(gap[batch.loss_mask].abs().max()))

    fit(tmp_path, callbacks=[Watch()], reference={"refresh_every": 2})
    assert figures[0] == figures[2] == figures[4] == 0.0
    assert min(figures[1], figures[3]) > 1e-3


def test_only_a_reference_that_has_moved_is_in_the_checkpoint(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    fit(tmp_path, epochs=3, callbacks=[saver], reference={"refresh_every": 2})
    held = []
    for epoch in range(3):
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        held.append(set(saved["rlhf_lightning_frozen"]["models"]))
    assert held == [set(), set(), {"reference"}]


def test_a_moved_reference_stays_where_it_is_if_the_option_is_taken_back(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "a", save_on_train_epoch_end=True)
    before = fit(tmp_path, epochs=3, callbacks=[saver], reference={"refresh_every": 2})
    again = ModelCheckpoint(tmp_path, "b", save_on_train_epoch_end=True)
    after = fit(tmp_path, callbacks=[again], ckpt=str(tmp_path / "a.ckpt"))
    assert len(after.references) == 2
    for reference in after.references:
        assert torch.equal(reference, before.references[-1])
    saved = torch.load(tmp_path / "b.ckpt", weights_only=True)
    assert "reference" in saved["rlhf_lightning_frozen"]["models"]


def test_a_module_cannot_go_back_to_before_its_reference_moved(tmp_path: Path) -> None:
    """A checkpoint from then does not hold the first weights, and the module no longer has them."""
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    how = {"reference": {"refresh_every": 2}}
    module, weights = grpo(**how), Weights()
    quiet_trainer(tmp_path, max_epochs=4, callbacks=[saver, weights]).fit(module, rollouts())

    def resume(epoch: int, again: Any) -> list[torch.Tensor]:
        trainer, seen = quiet_trainer(tmp_path, max_epochs=4), Weights()
        trainer.callbacks.append(seen)
        trainer.fit(again, rollouts(), ckpt_path=str(tmp_path / f"epoch={epoch}.ckpt"))
        return seen.references

    with pytest.raises(RuntimeError, match="from before the reference model first moved"):
        resume(0, module)
    for epoch, again in ((2, module), (0, grpo(**how))):
        references = resume(epoch, again)
        for found, expected in zip(references, weights.references[epoch + 1 :], strict=True):
            assert torch.equal(found, expected)


def test_a_second_run_of_the_module_counts_its_own_phases(tmp_path: Path) -> None:
    module, weights = grpo(reference={"refresh_every": 2}), Weights()
    for _ in range(2):
        trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[weights])
        trainer.fit(module, rollouts())
    for phase, source in enumerate([0, 0, 2, 2, 2, 5]):
        assert torch.equal(weights.references[phase], weights.policies[source]), phase


def test_a_crash_between_a_move_and_the_first_update_does_not_move_it_twice(tmp_path: Path) -> None:
    class Crash(RolloutCallback):
        def on_rollout_end(self, trainer, pl_module, batch, samples, metrics) -> None:
            if batch.policy_version == 2:
                raise KeyError("stopped by the test")

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            trainer.save_checkpoint(tmp_path / "crash.ckpt")

    how = {"reference": {"ema_decay": 0.5}}
    whole = fit(tmp_path, **how)
    with pytest.raises(KeyError):
        fit(tmp_path, callbacks=[Crash()], **how)
    resumed = fit(tmp_path, ckpt=str(tmp_path / "crash.ckpt"), **how)
    assert len(resumed.references) == 3
    for found, expected in zip(resumed.references, whole.references[2:], strict=True):
        assert torch.equal(found, expected)
