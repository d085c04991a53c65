"""Callbacks: what they write, and that rollout events reach those of users."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from tiny import Sums, grpo, quiet_trainer, rollouts, sequences, sft
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.callbacks import HFExport, SampleLogger, Throughput
from rlhf_lightning.callbacks.sample_logger import as_code, samples_table
from rlhf_lightning.core.checkpoint import current_umask
from rlhf_lightning.core.export import prepare_export
from rlhf_lightning.data import ChatOptions
from rlhf_lightning.io.jsonl import read_jsonl


class Journal(Callback):
    """No RolloutCallback: any callback may define the hooks, or only some of them."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_rollout_start(self, trainer, pl_module, phase) -> None:
        self.events.append(("start", phase))

    def on_weights_updated(self, trainer, pl_module, version) -> None:
        self.events.append(("weights", version))

    def on_rollout_progress(self, trainer, pl_module, done, total) -> None:
        self.events.append(("progress", done, total))

    def on_rollout_end(self, trainer, pl_module, batch, samples, metrics) -> None:
        assert len(batch) == len(samples) == 16
        assert batch.advantages is not None
        assert {"reward", "completions/mean_length", "time/rollout"} <= set(metrics)
        self.events.append(("end", batch.policy_version))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.events.append(("update", batch_idx))


def test_rollout_events_reach_any_callback_in_order(tmp_path: Path) -> None:
    journal = Journal()
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[journal, Callback()])
    trainer.fit(grpo(), rollouts(steps=2))
    events = [event for event in journal.events if event[0] != "progress"]
    one = [("start", 0), ("weights", 0), ("end", 0), ("update", 0), ("update", 1)]
    two = [("start", 1), ("weights", 1), ("end", 1), ("update", 0), ("update", 1)]
    assert events == one + two
    done = [event[1] for event in journal.events if event[0] == "progress"]
    assert done
    assert all(event[2] == 16 for event in journal.events if event[0] == "progress")
    assert 16 in done


def samples_of(folder: Path) -> list[dict[str, Any]]:
    found = read_jsonl(folder / "samples.jsonl")
    assert found.bad_lines == 0
    return found.records


def test_a_phases_figures_are_there_for_callbacks_when_it_ends(tmp_path: Path) -> None:
    class Compare(Callback):
        def on_rollout_end(self, trainer, pl_module, batch, samples, metrics) -> None:
            self.reward = metrics["reward"]

        def on_train_epoch_end(self, trainer, pl_module) -> None:
            found.append((float(trainer.callback_metrics["rollout/reward"]), self.reward))

    found: list[tuple[float, float]] = []
    quiet_trainer(tmp_path, max_epochs=3, callbacks=[Compare()]).fit(grpo(), rollouts())
    assert len(found) == 3
    assert all(a == pytest.approx(b, rel=1e-6) for a, b in found)


def test_samples_are_logged_and_a_resumed_run_logs_each_once(tmp_path: Path) -> None:
    def fit(folder: Path, epochs: int, ckpt: str | None = None) -> None:
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        log = SampleLogger(path=str(folder / "samples.jsonl"))
        trainer = quiet_trainer(folder, max_epochs=epochs, callbacks=[saver, log])
        trainer.fit(grpo(), rollouts(steps=2), ckpt_path=ckpt)

    fit(tmp_path / "whole", 3)
    whole = samples_of(tmp_path / "whole")
    assert len(whole) == 3 * 16
    assert {"step", "id", "prompt", "completion", "reward", "advantage"} <= set(whole[0])
    folder = tmp_path / "stopped"
    fit(folder, 3)
    with (folder / "samples.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "torn')
    for step in (3, 2):  # the middle of phase 1, and its start
        fit(folder, 3, str(folder / f"step={step}.ckpt"))
        assert samples_of(folder) == whole


def test_the_table_shows_text_that_cannot_act() -> None:
    sample = {
        "prompt": "2+2=",
        "completion": "<img src=http://evil>`|\x1b[31m\n| a |",
        "reward": None,
        "verdicts": {"math": "wrong"},
        "completion_length": 3,
    }
    table = samples_table([sample], 500)
    row = table.splitlines()[2]
    assert len(table.splitlines()) == 3
    assert row.count("|") == 7
    assert row.count("`") == 4
    assert "\x1b" not in table
    assert "none" in row
    assert as_code("abcdef", 3) == "`abc…`"


def test_samples_reach_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = quiet_trainer(tmp_path, max_epochs=1, logger=logger, callbacks=[SampleLogger()])
    trainer.fit(grpo(), rollouts())
    logger.finalize("success")
    written = b"".join(p.read_bytes() for p in tmp_path.glob("events*"))
    assert b"rollout/samples" in written
    assert (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize("what", ["grpo", "sft"])
def test_the_export_is_the_trained_model(what: str, tmp_path: Path) -> None:
    module, data = (grpo(), rollouts()) if what == "grpo" else (sft(), sequences())
    folder, umask = tmp_path / "export", current_umask()
    sft_export = HFExport(str(folder))
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[sft_export]).fit(sft(), sequences())
    export = HFExport(str(folder))
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[export]).fit(module, data)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, value in module.language_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert list(folder.glob("*.safetensors"))
    assert {oct(p.stat().st_mode & 0o777) for p in folder.iterdir()} == {oct(0o666 & ~umask)}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("12+3=")["input_ids"] == module.tokenizer("12+3=")["input_ids"]
    assert not list(tmp_path.glob(".*"))


def test_a_run_resumed_at_its_very_end_still_exports(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    quiet_trainer(tmp_path, max_epochs=2, callbacks=[saver]).fit(grpo(), rollouts(steps=2))
    export = HFExport(str(tmp_path / "export"))
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[export])
    trainer.fit(grpo(), rollouts(steps=2), ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert trainer.global_step == 4
    assert (tmp_path / "export" / "config.json").exists()


def test_the_export_carries_the_chat_template_it_was_trained_with(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    data = sequences(chat=ChatOptions(template=template))
    export = HFExport(str(tmp_path / "export"))
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[export]).fit(sft(), data)
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == template


def test_an_export_replaces_nothing_but_an_export(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[HFExport(str(tmp_path / "run"))])
    with pytest.raises(FileExistsError, match=r"not of an earlier export \(notes.txt\)"):
        trainer.fit(sft(), sequences())
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_fast_dev_run_does_not_replace_a_good_model(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[HFExport(str(folder))]).fit(sft(), sequences())
    before = (folder / "model.safetensors").read_bytes()
    quiet_trainer(tmp_path, fast_dev_run=True, callbacks=[HFExport(str(folder))]).fit(
        sft(), sequences()
    )
    assert (folder / "model.safetensors").read_bytes() == before


def test_an_export_that_a_kill_left_half_replaced_is_put_back(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[HFExport(str(folder))]).fit(sft(), sequences())
    before = (folder / "model.safetensors").read_bytes()
    folder.rename(tmp_path / ".earlier-export")
    (tmp_path / ".export-export-abc").mkdir()
    prepare_export(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_run_with_nothing_left_under_max_steps_still_exports(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(grpo(), rollouts(steps=2))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = quiet_trainer(tmp_path, max_steps=2, callbacks=[HFExport(str(tmp_path / "export"))])
    again.fit(grpo(), rollouts(steps=2), ckpt_path=str(tmp_path / "end.ckpt"))
    assert (tmp_path / "export" / "config.json").exists()


@pytest.mark.parametrize("logs", [1, 2])
def test_a_new_run_puts_the_samples_of_an_earlier_one_aside(logs: int, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    callbacks = [SampleLogger(path=str(path)) for _ in range(logs)]
    for log in (callbacks[0], callbacks[-1]):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[log]).fit(grpo(), rollouts())
    assert path.read_text() == (tmp_path / "samples.1.jsonl").read_text()


def test_a_callback_that_has_seen_a_run_fail_logs_the_resumed_one(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 1:
                trainer.save_checkpoint(tmp_path / "phase-0.ckpt")
            if trainer.global_step == 3:
                raise RuntimeError("out of luck")

    log = SampleLogger(path=str(tmp_path / "samples.jsonl"))
    with pytest.raises(RuntimeError, match="out of luck"):
        quiet_trainer(tmp_path, max_epochs=3, callbacks=[log, Fails()]).fit(grpo(), rollouts())
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[log])
    trainer.fit(grpo(), rollouts(), ckpt_path=str(tmp_path / "phase-0.ckpt"))
    assert [record["step"] for record in samples_of(tmp_path)] == [0] * 16 + [1] * 16 + [2] * 16
    trainer.fit_loop.max_epochs = 4
    trainer.fit(trainer.lightning_module, trainer.datamodule)
    assert len(samples_of(tmp_path)) == 4 * 16


def test_throughput_accounts_for_the_phase(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[Throughput()])
    trainer.fit(grpo(), rollouts(steps=2))
    found = {k: float(v) for k, v in trainer.callback_metrics.items()}
    shares = [found[f"time/{part}_share"] for part in ("rollout", "experience", "update")]
    assert all(0 < share < 1 for share in shares)
    assert sum(shares) <= 1
    tokens = found["rollout/completions/mean_length"] * 16
    assert found["time/tokens_per_second"] * found["time/phase"] == pytest.approx(tokens, rel=1e-5)


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_the_progress_bar_moves_during_rollouts(
    kind: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    class Watch(Callback):
        def look(self, trainer: Any) -> Any:
            bar = trainer.progress_bar_callback.train_progress_bar
            if kind is TQDMProgressBar:
                return (bar.desc, bar.n, bar.total)
            return (bar.description, bar.completed, bar.total)

        def on_rollout_progress(self, trainer, pl_module, done, total) -> None:
            seen.append(self.look(trainer))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            seen.append(self.look(trainer))

    trainer = quiet_trainer(
        tmp_path, max_epochs=1, enable_progress_bar=True, callbacks=[kind(), Watch()]
    )
    trainer.fit(grpo(), rollouts(steps=2))
    during = [look for look in seen if "rollouts" in look[0]]
    assert during[0][0].startswith("Phase 0 rollouts")
    assert [look[1] for look in during] == sorted(look[1] for look in during)
    # a user's callback is called before the bar's own
    assert 0 < during[-1][1] < during[-1][2] == 16
    assert seen[-1][2] == 2
    capfd.readouterr()


def test_export_of_a_foreign_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot export a BoringModel"):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[HFExport("x")]).fit(BoringModel())


def test_records_are_json(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    callbacks = [SampleLogger(path=str(path), every_n_phases=2, max_samples=3)]

    class WithEmptyCells(Sums):
        """As Parquet and pandas hand over a number that is missing."""

        def load(self) -> list[dict[str, Any]]:
            return [{**row, "difficulty": float("nan")} for row in super().load()]

    data = rollouts(prompts=WithEmptyCells())
    quiet_trainer(tmp_path, max_epochs=3, callbacks=callbacks).fit(grpo(), data)
    lines = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        for line in path.read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [0, 0, 0, 2, 2, 2]
    assert lines[0]["columns"]["difficulty"] is None
