"""What a run says of its sizes is what it then does."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from lightning.pytorch import Callback

from rlhf_lightning.data.phase import PhaseConfig
from rlhf_lightning.data.prompts import PromptSource
from rlhf_lightning.data.sizes import describe_rollouts, describe_rows
from rlhf_lightning.types import SamplingParams

SAMPLING = SamplingParams(n=8, max_new_tokens=100)


def test_rollouts_by_hand() -> None:
    phase = PhaseConfig(prompts=16, steps=4, update_epochs=2)
    assert describe_rollouts([7, 28, 3], SAMPLING, phase, accumulate=2, ranks=2, held_out=1200) == {
        "prompts": "3, the longest 28 tokens; 1,200 held out",
        "completions": "8 a prompt, at most 100 tokens",
        "a phase": "16 prompts x 8 = 128 completions, at most 16,384 tokens",
        "its updates": "2 passes of 4 steps of 32 completions (the global batch)",
        "a step": "2 micro-batches on each of 2 processes of about 8 completions, at most 1,024"
        " tokens",
    }


def test_rows_by_hand() -> None:
    assert describe_rows([10, 20, 30, 40, 50], 75, steps=2, accumulate=1, ranks=1) == {
        "rows": "5, the longest 50 tokens",
        "an epoch": "150 tokens, 75 of them trained on",
        "its updates": "2 steps of 3 rows (the global batch)",
        "a step": "1 micro-batch of about 3 rows, at most 150 tokens",
    }


@pytest.mark.parametrize(("limit", "refused"), [(2048, False), (2047, True), (127, True)])
def test_a_budget_that_long_completions_could_pass(limit: int, refused: bool) -> None:
    phase = PhaseConfig(prompts=4, max_tokens_per_micro_batch=limit)
    arguments: Any = ([28, 3], SAMPLING, phase, 2, 1)  # two micro-batches of 16 rows of 128 tokens
    if not refused:
        assert describe_rollouts(*arguments)
        return
    advice = "one row alone has 128" if limit < 128 else "accumulate_grad_batches to 4"
    with pytest.raises(ValueError, match=f"longest prompt and 100 new tokens, .*{advice}"):
        describe_rollouts(*arguments)


class Watch(Callback):
    """The largest micro-batch of a run."""

    rows = tokens = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.rows = max(self.rows, len(batch))
        self.tokens = max(self.tokens, batch.input_ids.numel())


@pytest.mark.parametrize("kind", ["rollouts", "rows"])
def test_bounds_hold_in_a_run(kind: str, tmp_path: Any) -> None:
    watch = Watch()
    trainer = tiny.quiet_trainer(
        tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=[watch]
    )
    data: Any = tiny.rollouts() if kind == "rollouts" else tiny.sequences()
    trainer.fit(tiny.grpo() if kind == "rollouts" else tiny.sft(), data)
    said = data.sizes()["a step"]
    bound = int(said.split("at most ")[1].split(" ")[0].replace(",", ""))
    rows = int(said.split("about ")[1].split(" ")[0])
    assert 0 < watch.tokens <= bound
    assert watch.rows <= rows or watch.tokens < bound


def test_every_epoch_of_rows_is_checked_before_the_first(tmp_path: Any) -> None:
    """The order of an epoch follows from its number, so its micro-batches are known."""
    limits = []
    for epochs in (1, 8):
        largest = Watch()
        trainer = tiny.quiet_trainer(tmp_path, max_epochs=epochs, callbacks=[largest])
        trainer.fit(tiny.sft(), tiny.sequences(dataset=Ragged()))
        limits.append(largest.tokens)
    assert limits[0] < limits[1], "choose other rows: the first epoch must not be the worst"
    trainer = tiny.quiet_trainer(tmp_path, max_epochs=8, callbacks=[Sizes()])
    with pytest.raises(ValueError, match="max_tokens_per_micro_batch"):
        trainer.fit(
            tiny.sft(), tiny.sequences(dataset=Ragged(), max_tokens_per_micro_batch=limits[0])
        )
    assert trainer.global_step == 0
    trainer = tiny.quiet_trainer(tmp_path, max_epochs=8, callbacks=[Sizes()])
    trainer.fit(tiny.sft(), tiny.sequences(dataset=Ragged(), max_tokens_per_micro_batch=limits[1]))
    assert trainer.current_epoch == 8


class Ragged(PromptSource):
    """Rows of 3 to 42 tokens, the longest of them rare."""

    def load(self) -> list[dict[str, Any]]:
        lengths = [*range(1, 31), 40]
        return [{"prompt": "1" * length, "completion": "2"} for length in lengths]


class Sizes(Callback):
    """Asks for the sizes when everything is there, as the command line does."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        trainer.datamodule.sizes()
