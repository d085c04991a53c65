"""NaN and infinity never reach the weights, nor a file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from tiny import quiet_trainer, sequences, sft

from rlhf_lightning.core.finite import FiniteGuard, check_weights, first_non_finite, gradient_norm

NAN, INF = float("nan"), float("inf")


class Poison(Callback):
    """Spoils the gradients or the loss of some micro-batches."""

    def __init__(self, *batches: int, gradient: float | None = NAN, loss: float | None = None):
        self.batches = set(batches)
        self.gradient, self.loss = gradient, loss
        self.seen = 0

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if self.seen in self.batches and self.loss is not None:
            loss.data.fill_(self.loss)

    def on_after_backward(self, trainer, pl_module) -> None:
        if self.seen in self.batches and self.gradient is not None:
            parameter = next(iter(pl_module.parameters()))
            parameter.grad.view(-1)[3] = self.gradient
        self.seen += 1


class Weights(Callback):
    """Weights, gradient norms and optimizer steps after each micro-batch."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.norms: list[float] = []

    def on_after_backward(self, trainer, pl_module) -> None:
        self.norms.append(float(gradient_norm(pl_module.parameters())))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        flat = [parameter.detach().flatten().clone() for parameter in pl_module.parameters()]
        self.weights.append(torch.cat(flat))


def fit(folder: Path, *callbacks: Callback, module: Any = None, **options: Any) -> Any:
    """Six micro-batches of supervised training, and what it did to the weights."""
    watch = Weights()
    options = {"max_epochs": 1, **options}
    trainer = quiet_trainer(folder, callbacks=[*callbacks, watch], **options)
    trainer.fit(module or sft(), sequences())
    return trainer, watch


@pytest.mark.parametrize(
    ("poison", "cause"),
    [
        ({}, r"step 2 is skipped, because the gradient of policy\.model\S+ is not finite"),
        ({"gradient": -INF}, "is not finite"),
        ({"gradient": None, "loss": NAN}, "step 2 is skipped, because the loss is not finite"),
        ({"gradient": None, "loss": INF}, "the loss is not finite"),
        ({"gradient": 1e30}, "the gradient is too large to square"),
    ],
)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_that_is_not_finite_changes_nothing(
    poison: dict[str, Any], cause: str, clip: float | None, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=cause):
        trainer, watch = fit(tmp_path, Poison(2, **poison), gradient_clip_val=clip)
    assert torch.equal(watch.weights[2], watch.weights[1])
    for before, after in [(0, 1), (2, 3), (4, 5)]:
        assert not torch.equal(watch.weights[before], watch.weights[after])
    assert torch.isfinite(watch.weights[-1]).all()
    steps = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert steps == {5}, "the optimizer counted the skipped step"
    assert trainer.global_step == 6
    figures = trainer.callback_metrics
    assert figures["train/skipped_steps"] == 1
    assert torch.isfinite(figures["train/loss_epoch"])
    assert float(figures["train/grad_norm"]) == pytest.approx(watch.norms[-1], rel=1e-6)
    norms = [norm for i, norm in enumerate(watch.norms) if i != 2]
    assert float(figures["train/grad_norm_epoch"]) == pytest.approx(sum(norms) / 5, rel=1e-6)


def test_figures_are_those_of_the_steps_that_were_taken(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, Poison(1, 2))
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            losses.append(float(outputs["loss"]))

    again, _ = fit(tmp_path, Poison(1, 2), Losses())
    kept = [loss for i, loss in enumerate(losses) if i not in (1, 2)]
    for run in (trainer, again):
        found = float(run.callback_metrics["train/loss_epoch"])
        assert found == pytest.approx(sum(kept) / 4, rel=1e-6)


def test_one_bad_micro_batch_skips_its_whole_step(tmp_path: Path) -> None:
    trainer, watch = fit(
        tmp_path, Poison(2, gradient=None, loss=NAN), accumulate_grad_batches=2, max_epochs=2
    )
    assert torch.equal(watch.weights[3], watch.weights[1])
    assert not torch.equal(watch.weights[5], watch.weights[3])
    assert trainer.callback_metrics["train/skipped_steps"] == 0, "that was the epoch before"
    assert {int(s["step"]) for s in trainer.optimizers[0].state.values()} == {
        trainer.global_step - 1
    }


def test_skipped_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"3 optimizer steps in a row .* \(step 4\)"):
        fit(tmp_path, Poison(2, 3, 4))
    fit(tmp_path, Poison(0, 1, 3, 4))  # never three in a row


def test_the_limit_is_set_by_a_guard_of_ones_own(tmp_path: Path) -> None:
    guard = FiniteGuard(max_consecutive=1)
    with pytest.raises(FloatingPointError, match=r"1 optimizer steps in a row .* \(step 2\)"):
        fit(tmp_path, Poison(2), guard)
    trainer, _ = fit(tmp_path, Poison(1, 2, 3, 4), FiniteGuard(max_consecutive=5))
    assert sum(isinstance(callback, FiniteGuard) for callback in trainer.callbacks) == 1
    assert trainer.callback_metrics["train/skipped_steps"] == 4
    with pytest.raises(ValueError, match="max_consecutive is 0"):
        FiniteGuard(max_consecutive=0)


def test_a_run_that_was_ended_goes_on_where_the_good_steps_ended(tmp_path: Path) -> None:
    """The checkpoint of the exception repeats the step that ended the run, and nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = fit(tmp_path, Poison(1, 2), max_epochs=2)
        saver = ModelCheckpoint(tmp_path / "c", "x", save_on_exception=True)
        with pytest.raises(FloatingPointError, match="3 optimizer steps in a row"):
            fit(tmp_path, Poison(1, 2, 3), saver, max_epochs=2)
        (saved,) = (tmp_path / "c").glob("*.ckpt")
        watch = Weights()
        again = quiet_trainer(tmp_path, callbacks=[watch], max_epochs=2)
        again.fit(sft(), sequences(), ckpt_path=str(saved))
        limited = quiet_trainer(tmp_path, callbacks=[Poison(0)], max_epochs=2)
        with pytest.raises(FloatingPointError, match="3 optimizer steps in a row"):
            limited.fit(sft(), sequences(), ckpt_path=str(saved))
    assert len(watch.weights) == 9
    for mine, theirs in zip(watch.weights, whole[1].weights[3:], strict=True):
        assert torch.equal(mine, theirs)
    for name in ("train/skipped_steps", "train/loss_epoch", "train/grad_norm_epoch"):
        assert again.callback_metrics[name] == whole[0].callback_metrics[name]


def test_a_gradient_scaler_may_search_for_its_scale(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    poison = Poison(0, 1, 2, 3, gradient=INF)
    trainer, _ = fit(tmp_path, poison, plugins=[plugin])
    assert trainer.callback_metrics["train/skipped_steps"] == 4
    assert scaler.get_scale() == 2.0**6
    exhausted = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    with pytest.raises(FloatingPointError, match=r"3 optimizer steps in a row .* \(step 4\)"):
        fit(tmp_path, Poison(*range(6), gradient=INF), plugins=[exhausted])


class Spoil(Callback):
    """Puts a value into a weight, or into the optimizer's state, after a step."""

    def __init__(self, after: int, optimizer: bool = False) -> None:
        self.after, self.optimizer = after, optimizer

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == self.after:
            weight = pl_module.policy.model.lm_head.weight
            state = trainer.optimizers[0].state[weight]["exp_avg"]
            (state if self.optimizer else weight.data)[0, 0] = NAN


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("last", [False, True, "link"])
def test_weights_that_are_not_finite_are_never_saved_over_good_ones(
    weights_only: bool, last: Any, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(
        tmp_path,
        "{step}",
        every_n_train_steps=1,
        save_top_k=1,
        save_last=last,
        save_weights_only=weights_only,
    )
    with pytest.raises(FloatingPointError, match=r"step 4 is not saved, because policy\S+lm_head"):
        fit(tmp_path, Spoil(3), saver)
    kept = sorted(p.name for p in tmp_path.glob("*.ckpt"))
    assert kept == (["last.ckpt", "step=3.ckpt"] if last else ["step=3.ckpt"])
    for name in kept:
        weights = torch.load(tmp_path / name)["state_dict"]
        assert all(torch.isfinite(value).all() for value in weights.values())


def test_an_optimizer_that_is_not_finite_is_not_saved_either(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=1)
    with pytest.raises(FloatingPointError, match="the optimizer's exp_avg of parameter"):
        fit(tmp_path, Spoil(3, optimizer=True), saver)
    assert [p.name for p in tmp_path.glob("*.ckpt")] == ["step=3.ckpt"]


def test_the_end_of_a_run_says_that_the_weights_themselves_are_bad(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"lm_head\.weight itself is not finite"):
        fit(tmp_path, Spoil(1))


def test_an_export_that_is_not_finite_is_refused_and_the_old_one_stays(tmp_path: Path) -> None:
    module = sft()
    fit(tmp_path, module=module)
    folder = tmp_path / "export"
    module.export(folder)
    before = (folder / "model.safetensors").read_bytes()
    module.language_model.lm_head.weight.data[0, 0] = INF
    with pytest.raises(FloatingPointError, match=r"export: not written, because .*lm_head"):
        module.export(folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_what_is_finite_passes_whatever_its_sum() -> None:
    large = torch.full((4,), 3e38)
    assert first_non_finite([("a", large), ("i", torch.tensor([1]))]) is None
    assert first_non_finite([("a", large), ("b", torch.tensor([INF, -INF])), ("c", large)]) == "b"
    module = torch.nn.Linear(2, 2)
    module.register_buffer("mask", torch.full((2,), -INF))
    check_weights(module, "x")
