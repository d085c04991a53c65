"""SFT as a LightningModule: parity with Hugging Face, invariances, learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from tiny import Sums, quiet_trainer, sequences, sft

from rlhf_lightning.data import PromptSource
from rlhf_lightning.types import SequenceBatch


class Rows(PromptSource):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def load(self) -> list[dict[str, Any]]:
        return self.rows


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


class Collect(Callback):
    def __init__(self) -> None:
        self.batches: list[SequenceBatch] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.batches.append(batch)
        self.losses.append(float(outputs["loss"]))


def test_loss_and_gradients_are_those_of_hugging_face(tmp_path: Path) -> None:
    module = sft(optimizer=sgd)
    collect = Collect()

    class Compare(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            batch = pl_module._last
            model = pl_module.language_model
            labels = torch.where(batch.loss_mask, batch.input_ids, -100)
            ours = [p.grad.clone() for p in model.parameters()]
            loss = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels
            ).loss
            theirs = torch.autograd.grad(loss, list(model.parameters()))
            losses.append(float(loss))
            for a, b in zip(ours, theirs, strict=True):
                # Llama's norm computes in float32 even in a float64 model
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            pl_module._last = batch

    losses: list[float] = []
    trainer = quiet_trainer(
        tmp_path, max_epochs=1, precision="64-true", callbacks=[collect, Compare()]
    )
    trainer.fit(module, sequences())
    assert len(losses) == 6
    assert collect.losses == pytest.approx(losses, rel=1e-6)


def test_only_completions_count_and_every_row_is_seen_once(tmp_path: Path) -> None:
    collect = Collect()
    module = sft()
    quiet_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=[collect]).fit(
        module, sequences(batch_size=30)
    )
    tokenizer = module.tokenizer
    rows = Sums().load()
    seen = []
    for batch in collect.batches:
        for ids, mask, attention in zip(
            batch.input_ids, batch.loss_mask, batch.attention_mask, strict=True
        ):
            completion = tokenizer.decode(ids[mask], skip_special_tokens=True)
            prompt = tokenizer.decode(ids[~mask & attention.bool()], skip_special_tokens=True)
            assert ids[mask][-1] == tokenizer.eos_token_id
            assert (ids == tokenizer.eos_token_id).sum() == 1
            seen.append((prompt, completion))
    expected = sorted((row["prompt"], row["completion"]) for row in rows)
    assert sorted(seen[:100]) == expected
    assert sorted(seen[100:]) == expected
    assert seen[:100] != seen[100:]


def test_gradients_do_not_depend_on_how_a_step_is_cut(tmp_path: Path) -> None:
    ends = []
    for parts in (1, 2, 5):
        module = sft(optimizer=sgd)
        options = {"accumulate_grad_batches": parts, "precision": "64-true"}
        quiet_trainer(tmp_path, max_epochs=1, **options).fit(module, sequences(batch_size=40))
        ends.append({k: v.clone() for k, v in module.state_dict().items()})
    for end in ends[1:]:
        for name, value in ends[0].items():
            torch.testing.assert_close(end[name], value, rtol=1e-10, atol=1e-12)


def test_padding_and_prompts_reach_neither_loss_nor_gradient() -> None:
    module = sft()
    module.configure_model()
    batch = SequenceBatch(
        input_ids=torch.tensor([[5, 6, 7, 8, 0, 0], [5, 6, 7, 8, 9, 10]]),
        attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]),
        loss_mask=torch.tensor([[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]).bool(),
        loss_denominator=4.0,
    )
    loss = module.training_step(batch, 0)
    batch.input_ids[0, 4:] = 11
    assert torch.equal(module.training_step(batch, 0), loss)


def test_rows_without_a_loss_token_contribute_nothing() -> None:
    module = sft()
    module.configure_model()
    batch = SequenceBatch(
        input_ids=torch.tensor([[5, 6, 7]]),
        attention_mask=torch.ones(1, 3, dtype=torch.long),
        loss_mask=torch.zeros(1, 3, dtype=torch.bool),
        loss_denominator=1.0,
    )
    loss = module.training_step(batch, 0)
    loss.backward()
    assert float(loss) == 0.0
    gradients = [p.grad for p in module.parameters()]
    assert all(g is not None and (g == 0).all() for g in gradients)


def test_train_loss_is_logged_per_step_over_all_its_tokens(tmp_path: Path) -> None:
    class Memory(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if "train/loss" in metrics:
                rows.append(float(metrics["train/loss"]))

    ends = []
    for parts in (1, 4):
        rows: list[float] = []
        options = {"accumulate_grad_batches": parts, "log_every_n_steps": 1}
        trainer = quiet_trainer(tmp_path, max_epochs=1, logger=Memory(), **options)
        trainer.fit(sft(optimizer=sgd), sequences(batch_size=50))
        ends.append(rows)
    assert len(ends[0]) == 2
    assert ends[1] == pytest.approx(ends[0], rel=1e-5)


class Figures(DummyLogger):
    """Keeps the figures that are logged once an optimizer step, and once an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, float]] = []
        self.epochs: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        kept = self.steps if "train/loss" in metrics else self.epochs
        kept.append({name: float(value) for name, value in metrics.items()})


def logged(tmp_path: Path, **options: Any) -> Figures:
    memory = Figures()
    trainer = quiet_trainer(
        tmp_path, max_epochs=2, logger=memory, log_every_n_steps=1, precision="64-true", **options
    )
    trainer.fit(sft(optimizer=sgd, log_entropy=True), sequences(batch_size=50, validation=Sums(10)))
    return memory


def test_figures_are_those_of_the_whole_step_and_epoch(tmp_path: Path) -> None:
    whole, cut = logged(tmp_path), logged(tmp_path, accumulate_grad_batches=4)
    assert len(whole.steps) == 4
    for a, b in zip(whole.steps + whole.epochs, cut.steps + cut.epochs, strict=True):
        assert b == pytest.approx(a, rel=1e-6)
    ends = [row for row in whole.epochs if "train/loss_epoch" in row]
    for epoch, end in enumerate(ends):
        losses = [row["train/loss"] for row in whole.steps[2 * epoch : 2 * epoch + 2]]
        assert end["train/loss_epoch"] == pytest.approx(sum(losses) / 2)
    assert len(ends) == 2
    tokens = sum(len(f"{r['prompt']}{r['completion']}") + 1 for r in Sums().load())
    seen = [row["train/num_tokens"] for row in whole.steps]
    assert seen == sorted(seen)
    assert (seen[1], seen[3]) == (tokens, 2 * tokens)
    held_out = sum(len(f"{r['prompt']}{r['completion']}") + 1 for r in Sums(10).load())
    assert [row["eval/num_tokens"] for row in whole.epochs if "eval/loss" in row] == [held_out] * 2


def test_accuracy_and_entropy_are_those_of_the_logits() -> None:
    module = sft(log_entropy=True)
    module.configure_model()
    batch = SequenceBatch(
        input_ids=torch.tensor([[5, 6, 7, 8, 0], [5, 6, 7, 8, 9]]),
        attention_mask=torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
        loss_mask=torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 1, 1]]).bool(),
        loss_denominator=5.0,
    )
    with torch.no_grad():
        logits = module.language_model(batch.input_ids, attention_mask=batch.attention_mask).logits
    predicted = logits[:, :-1].argmax(-1)
    batch.input_ids[1, 3:] = predicted[1, 2]  # right at one place, whatever the model
    with torch.no_grad():
        logits = module.language_model(batch.input_ids, attention_mask=batch.attention_mask).logits
    marked = batch.loss_mask[:, 1:]
    log_p = logits[:, :-1].log_softmax(-1)
    accuracy = (log_p.argmax(-1) == batch.input_ids[:, 1:])[marked].double().mean()
    entropy = -(log_p.exp() * log_p).sum(-1)[marked].mean()
    loss = -log_p.gather(-1, batch.input_ids[:, 1:, None])[..., 0][marked].mean()
    module.training_step(batch, 0)
    module.evaluation_step(batch)
    assert accuracy > 0
    expected = {"loss": loss, "mean_token_accuracy": accuracy, "entropy": entropy}
    for name, value in expected.items():
        assert module.phase_metrics.compute()[f"train/{name}_epoch"] == pytest.approx(float(value))
        assert module.evaluation_metrics.compute()[name] == pytest.approx(float(value))
    assert module.evaluation_metrics.compute()["num_tokens"] == 9


@pytest.mark.parametrize("where", ["between its micro-batches", "in the optimizer"])
def test_tokens_of_a_step_that_is_done_again_are_not_counted_twice(
    where: str, tmp_path: Path
) -> None:
    class Stop(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 3 and where == "between its micro-batches":
                raise KeyError("stopped by the test")

    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if len(collect.batches) == 3 and where == "in the optimizer":
                raise KeyError("stopped by the test")

    class Save(Callback):
        def on_exception(self, trainer, pl_module, exception) -> None:
            trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    collect = Collect()
    callbacks = [collect, Stop(), Save()]
    trainer = quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=callbacks)
    module = sft(optimizer=lambda params: Fails(params, lr=0.1))
    with pytest.raises(KeyError):
        trainer.fit(module, sequences(batch_size=20))
    assert len(collect.batches) == 3
    saved = torch.load(tmp_path / "stopped.ckpt")["num_tokens"]
    assert saved == sum(int(batch.attention_mask.sum()) for batch in collect.batches[:2])


def test_it_learns_sums_of_digits(tmp_path: Path) -> None:
    data = sequences(batch_size=25, validation=Sums(50))
    trainer = quiet_trainer(tmp_path, max_epochs=150, check_val_every_n_epoch=150)
    trainer.fit(sft(optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3)), data)
    found = float(trainer.callback_metrics["eval/loss"])
    (validated,) = trainer.validate(datamodule=data, model=trainer.lightning_module, verbose=False)
    assert found < 0.1
    assert validated["eval/loss"] == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": Rows([])}, "dataset: the source has no rows"),
        ({"dataset": Rows([{"prompt": "1+1="}])}, "row 1"),
        ({"dataset": Rows(Sums(3).load()), "batch_size": 1}, "too few for"),
        ({"max_length": 4}, "longer than 4 tokens"),
        ({"max_tokens_per_micro_batch": 50}, "accumulate_grad_batches to"),
    ],
)
def test_bad_input_is_refused_before_training(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    steps: list[int] = []

    class Count(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            steps.append(1)

    trainer = quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[Count()])
    with pytest.raises(ValueError, match=message):
        trainer.fit(sft(), sequences(**options))
    assert not steps


def test_long_rows_are_dropped_or_cut_with_a_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for how, rows in (("drop", 55), ("truncate", 100)):
        collect = Collect()
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[collect])
        trainer.fit(sft(), sequences(max_length=6, too_long=how))
        assert sum(len(batch) for batch in collect.batches) == rows
        eos = sft().tokenizer.eos_token_id
        ended = sum(int((batch.input_ids == eos).sum()) for batch in collect.batches)
        assert ended == 55, "a row that was cut must not end in an EOS"
        assert "45 of 100" in capsys.readouterr().out
