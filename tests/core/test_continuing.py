"""Going on from a checkpoint with other options: what is refused, and what is said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import adamw, grpo, quiet_trainer, rollouts, sequences, sft, tiny_model

from rlhf_lightning.algorithms import SFTModule


def scheduled(rate: float) -> Any:
    return sft(
        optimizer=lambda p: torch.optim.AdamW(p, lr=rate),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, total_iters=8),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two runs, with and without a schedule, and of one's weights alone."""
    folder = tmp_path_factory.mktemp("saved")
    for name, module in (("plain", sft()), ("scheduled", scheduled(1e-2))):
        saver = ModelCheckpoint(folder, f"{name}-weights", save_weights_only=True)
        trainer = quiet_trainer(folder, max_epochs=1, callbacks=[saver])
        trainer.fit(module, sequences())
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    return folder


def resume(path: Path, module: SFTModule) -> Any:
    trainer = quiet_trainer(path.parent, max_epochs=2)
    trainer.fit(module, sequences(), ckpt_path=str(path))
    return trainer


def other(**model: Any) -> SFTModule:
    return SFTModule({**tiny_model(), **model}, optimizer=adamw)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            lambda: other(characters="0123456789+=abc"),
            r"another model or vocabulary: \S+embed_tokens.weight is \[15, 32\] in the checkpoint"
            r" and \[18, 32\] here; \S+lm_head.weight is .*Give the model",
        ),
        (lambda: SFTModule(tiny_model(hidden_size=64), optimizer=adamw), "and 18 more. Give the"),
        (
            lambda: SFTModule(tiny_model(num_hidden_layers=3), optimizer=adamw),
            r"layers\.2\.self_attn\.q_proj\.weight is missing in the checkpoint",
        ),
        (
            lambda: SFTModule(tiny_model(num_hidden_layers=1), optimizer=adamw),
            r"layers\.1\.self_attn\.q_proj\.weight is \[32, 32\] in the checkpoint and missing",
        ),
        (
            lambda: sft(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)),
            r"another optimizer: it has no option \['dampening', 'momentum', 'nesterov'\] of SGD",
        ),
        (
            lambda: sft(optimizer=lambda p: torch.optim.AdamW([*p, {"params": []}])),
            r"has groups of \[21\] parameters, the AdamW of this run \[21, 0\]",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused(module: Any, message: str, saved: Path) -> None:
    with pytest.raises(ValueError, match=message):
        resume(saved / "plain.ckpt", module())


def test_weights_alone_are_not_continued_but_can_be_used(saved: Path) -> None:
    weights = saved / "plain-weights.ckpt"
    with pytest.raises(ValueError, match=r"lacks optimizer_states.*save_weights_only"):
        resume(weights, sft())
    data = sequences(validation=sequences().dataset)
    quiet_trainer(saved).validate(sft(), data, ckpt_path=str(weights))
    SFTModule.load_from_checkpoint(weights)


@pytest.mark.parametrize("what", ["sft", "grpo"])
def test_another_versions_run_is_not_continued_but_its_weights_are_used(
    what: str, tmp_path: Path
) -> None:
    module, data = {"sft": (sft, sequences), "grpo": (grpo, rollouts)}[what]
    trainer = quiet_trainer(tmp_path, max_steps=3)
    trainer.fit(module(), data())
    path = tmp_path / "old.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path)
    del checkpoint["rlhf_lightning"]["layout"]  # as the first version wrote them
    checkpoint.pop("num_tokens", None)
    checkpoint[type(data()).__qualname__].pop("stream", None)
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"an earlier version of rlhf_lightning \(layout 1"):
        quiet_trainer(tmp_path, max_steps=4).fit(module(), data(), ckpt_path=str(path))
    held_out = sequences().dataset if what == "sft" else {"prompts": sequences().dataset}
    evaluated = quiet_trainer(tmp_path)
    evaluated.validate(module(), data(validation=held_out), ckpt_path=str(path))
    weights = evaluated.lightning_module.state_dict()
    for name, value in type(module()).load_from_checkpoint(path).state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][name])
        assert torch.equal(value, weights[name])


def test_a_trainer_that_is_used_again_says_nothing_of_our_callbacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=2)
    module, data = sft(), sequences(validation=sequences().dataset)
    with caplog.at_level("INFO"):
        trainer.fit(module, data)
        trainer.validate(module, data)
    assert "will override" not in caplog.text
    kinds = [type(callback) for callback in trainer.callbacks]
    assert len(kinds) == len(set(kinds))


def test_options_that_stay_the_checkpoints_are_pointed_out(saved: Path) -> None:
    def message(path: str, module: SFTModule) -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resume(saved / path, module)
        texts = [str(w.message) for w in caught if "goes on with" in str(w.message)]
        return texts[0] if texts else ""

    slower = sft(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.5))
    found = message("plain.ckpt", slower)
    assert "AdamW goes on with the checkpoint's lr 0.01 (now 0.001)" in found
    assert "weight_decay 0.01 (now 0.5)" in found
    adam = sft(optimizer=lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.01))
    assert "decoupled_weight_decay True (now False)" in message("plain.ckpt", adam)
    assert message("plain.ckpt", sft()) == ""
    assert message("scheduled.ckpt", scheduled(1e-2)) == "", "the schedule itself is no change"
    assert "initial lr 0.01 (now 0.001)" in message("scheduled.ckpt", scheduled(1e-3))


def test_loading_takes_options_and_weights_and_keywords_win(saved: Path) -> None:
    module = SFTModule.load_from_checkpoint(saved / "plain.ckpt")
    assert module.hparams["model"]["characters"] == tiny_model()["characters"]
    wanted = torch.load(saved / "plain.ckpt")["state_dict"]
    for name, value in module.state_dict().items():
        assert torch.equal(value, wanted[name])
    wide = tiny_model(hidden_size=64)
    with pytest.raises(ValueError, match="another model"):
        SFTModule.load_from_checkpoint(saved / "plain.ckpt", model=wide)
    with pytest.raises(ValueError, match="hparams_file is not supported"):
        SFTModule.load_from_checkpoint(saved / "plain.ckpt", hparams_file="x.yaml")
