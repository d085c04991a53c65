from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer

from rlhf_lightning.algorithms import GRPOModule
from rlhf_lightning.cli.main import main
from rlhf_lightning.cli.trainer import RLHFCLI, run_trainer
from rlhf_lightning.events import RolloutCallback
from rlhf_lightning.rewards import MathReward


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says when it refuses; fails where it does not."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


TYPOS = [
    (["--modle.kl.coef=1"], "--modle.kl.coef. Did you mean: --model.kl.coef?"),
    (["--model.kl.coeff=1"], "model.kl: there is no option coeff of KLConfig. Did you mean: coef?"),
    (["--model.optimiser=SGD"], "Did you mean: optimizer?"),
    (["--model.optimizer=SGD", "--model.optimizer.lrr=1"], "Did you mean: lr?"),
    (["--model.optimizer=AdamWW"], "Did you mean: AdamW?"),
    (["--model.policy_loss.aggregation=tokn"], "got 'tokn'. Did you mean: token?"),
    (["--model.model.dtpe=x"], "no option dtpe of ModelConfig. Did you mean: dtype?"),
    (["--model=GRPOModul"], "no class or function 'GRPOModul' for it. Did you mean: GRPOModule?"),
    (["--model=rlhf_lightning.algorithms.GRPOModul"], "Did you mean: GRPOModule?"),
    (["--model=Qwen/Qwen3"], "'Qwen/Qwen3' for it. A folder or hub name goes to model.model"),
    (["--data=RolloutDataModul"], "Did you mean: RolloutDataModule?"),
    (["--data.sampling.temperture=1"], "no option temperture of SamplingParams. Did you mean: tem"),
    (["--data.prompts.splitt=x"], "no option splitt of ArithmeticPrompts. Did you mean: split?"),
    (["--data.prompts.split=trian"], "data.prompts.split: expected one of train, validation"),
    (["--data.sampling.n=many"], "data.sampling.n: expected int, got 'many'."),
    (["--trainer.callbacks+=HFExprt"], "Did you mean: HFExport?"),
    (["--trainer.callbacks+=HFExport"], "trainer.callbacks: folder of HFExport must be given"),
    (["--trainer.max_epoch=1"], "--trainer.max_epoch. Did you mean: --trainer.max_epochs?"),
    (["--ckpt_pth=last"], "Did you mean: --ckpt_path?"),
    (["--weights_only=false"], "there is no option --weights_only."),
    (["--config=no.yaml"], "config: File does not exist"),
]


@pytest.mark.parametrize(("arguments", "message"), TYPOS, ids=[typo[0][-1] for typo in TYPOS])
def test_option_typos(
    arguments: list[str], message: str, grpo_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(["fit", "--config", grpo_file, *arguments], capsys)


KEYS = [
    ("trainer", "trainr", "Did you mean: trainer?"),
    ("max_epochs", "max_epoch", "no option trainer.max_epoch. Did you mean: max_epochs?"),
    ("sampling", "samplin", "of RolloutDataModule. Did you mean: sampling?"),
    ("coef", "coeff", "model.kl: there is no option coeff of KLConfig. Did you mean: coef?"),
    ("init_args", "init_arg", "init_args"),
    ("hidden_size", "hiden_size", "hidden_size"),
]


@pytest.mark.parametrize(("key", "typo", "message"), KEYS, ids=[key[1] for key in KEYS])
def test_key_typos_in_a_file(
    key: str, typo: str, message: str, grpo_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(grpo_file).read_text()
    Path(grpo_file).write_text(text.replace(f"{key}:", f"{typo}:", 1))
    assert message in refusal(["fit", "--config", grpo_file], capsys)


def test_a_key_twice_in_a_file(grpo_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Path(grpo_file).open("a") as file:
        file.write("trainer: {max_epochs: 1}\n")
    assert "the key 'trainer' stands in lines" in refusal(["fit", "--config", grpo_file], capsys)


def test_yaml_cannot_make_objects(grpo_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Path(grpo_file).open("a") as file:
        file.write("seed_everything: !!python/object/apply:os.system ['touch made']\n")
    refusal(["fit", "--config", grpo_file], capsys)
    assert not Path("made").exists()


@pytest.mark.parametrize(
    "options",
    [["--data.rewards=[MathReward]"], ["--data.rewards=[]", "--data.rewards+=MathReward"]],
)
def test_short_names(options: list[str], grpo_file: str) -> None:
    cli = RLHFCLI(["fit", "--config", grpo_file, *options], check_only=True)
    config = cli.config.fit
    assert config.model.class_path.endswith(".GRPOModule")
    assert [reward.class_path.rpartition(".")[2] for reward in config.data.init_args.rewards] == [
        MathReward.__name__
    ]


def test_null_in_a_nested_option_is_null(grpo_file: str) -> None:
    options = ["--data.prompts.size", "null", "--data.validation.prompts.size=null"]
    data = RLHFCLI(["fit", "--config", grpo_file, *options], check_only=True).config.fit.data
    assert data.init_args.prompts.init_args.size is None
    assert data.init_args.validation.prompts.init_args.size is None


def test_print_config_shows_defaults_and_can_be_run_again(
    grpo_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):
        main(["fit", "--config", grpo_file, "--print_config"])
    shown = capsys.readouterr().out
    config = yaml.safe_load(shown)
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-6
    assert config["data"]["init_args"]["phase"]["update_epochs"] == 1
    Path("printed.yaml").write_text(shown)
    again = RLHFCLI(["fit", "--config", "printed.yaml"], check_only=True)
    assert again.config.fit.model.init_args.kl.coef == 0.0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model.help", "GRPOModule"], "the penalty for leaving the reference model"),
        (["--model.help=GRPOModule", "--model.policy_loss.help"], "DAPO's clip-higher"),
        (["--data.help", "RolloutDataModule"], "functions with TRL's reward signature"),
        (["--trainer.callbacks.help", "HFExport"], "--trainer.callbacks.folder FOLDER"),
    ],
)
def test_help_of_a_class(options: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["fit", *options])
    assert exit.value.code == 0
    assert text in " ".join(capsys.readouterr().out.split())


def test_help_of_an_unknown_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean: GRPOModule?" in refusal(["fit", "--model.help", "GRPOModul"], capsys)


def test_flags_win_over_a_checkpoint(grpo_file: str) -> None:
    run_trainer(["fit", "--config", grpo_file])  # nothing may be written by default
    saved = ["--trainer.enable_checkpointing=true", "--trainer.callbacks+=ModelCheckpoint"]
    place = ["--trainer.callbacks.dirpath=ckpt", "--trainer.callbacks.save_last=true"]
    run_trainer(["fit", "--config", grpo_file, *saved, *place])
    flags = ["--model.policy_loss.clip_high=0.7", "--trainer.max_epochs=3"]
    cli = run_trainer(["fit", "--config", grpo_file, *flags, "--ckpt_path", "ckpt/last.ckpt"])
    assert isinstance(cli.model, GRPOModule)
    assert cli.model.policy_loss.clip_high == 0.7
    assert cli.trainer.global_step == 3  # one more phase than the checkpoint had


def test_options_that_changed_since_the_checkpoint_are_listed(
    grpo_file: str, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--trainer.default_root_dir=kept", "--trainer.enable_checkpointing=true"]
    saved = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=ckpt"]
    flags += [*saved, "--trainer.callbacks.save_last=true"]
    run_trainer(["fit", "--config", grpo_file, *flags])
    assert "other options" not in caplog.text
    changed = ["--trainer.max_epochs=3", "--data.sampling.temperature=0.5", "--ckpt_path=last"]
    run_trainer(["fit", "--config", grpo_file, *flags, *changed])
    listed = caplog.text[caplog.text.index("other options") :].splitlines()[1:3]
    assert listed == [
        "  data.init_args.sampling.temperature: 1.0 -> 0.5",
        "  trainer.max_epochs: 2 -> 3",
    ]


def test_missing_checkpoint_is_found_before_anything_is_built(
    grpo_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fit", "--config", grpo_file, "--ckpt_path", "no.ckpt"]
    assert "ckpt_path: there is no checkpoint 'no.ckpt'" in refusal(arguments, capsys)


def test_last_without_a_checkpoint_starts_afresh(grpo_file: str) -> None:
    with pytest.warns(UserWarning, match="no last checkpoint available"):
        cli = run_trainer(["fit", "--config", grpo_file, "--ckpt_path", "last"])
    assert cli.trainer.global_step == 2


def test_checkpoint_is_never_unpickled(
    grpo_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, ("exploded",)

    torch.save({"state_dict": Bomb()}, "bomb.ckpt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    refusal(["fit", "--config", grpo_file, "--ckpt_path", "bomb.ckpt"], capsys)
    assert not Path("exploded").exists()


def test_nothing_is_written_into_the_working_directory(grpo_file: str) -> None:
    run_trainer(["fit", "--config", grpo_file, "--trainer.default_root_dir=."])
    assert [path.name for path in Path.cwd().iterdir()] == [grpo_file]


def test_configuration_is_kept_beside_the_logs_and_replaced(grpo_file: str) -> None:
    for epochs in (1, 2):
        flags = ["--trainer.default_root_dir=kept", f"--trainer.max_epochs={epochs}"]
        run_trainer(["fit", "--config", grpo_file, *flags])
    assert yaml.safe_load(Path("kept/config.yaml").read_text())["trainer"]["max_epochs"] == 2


FILES = [
    ("", "odd.yaml: the file is empty"),
    ("- 1", "odd.yaml: it must hold a mapping, not list"),
    ("a: 1\nb: {c: 1\n", "odd.yaml: this is no valid YAML: line 3: expected ',' or '}'"),
    ("a: 1\na: 2\n", "odd.yaml: this is no valid YAML: the key 'a' stands in lines 1 and 2"),
]


@pytest.mark.parametrize(("text", "message"), FILES, ids=[message for _, message in FILES])
@pytest.mark.parametrize("flags", [["--config=odd.yaml"], ["--config", "odd.yaml"]])
def test_files_that_are_no_configuration(
    flags: list[str], text: str, message: str, grpo_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("odd.yaml").write_text(text)
    assert message in refusal(["fit", "--config", grpo_file, *flags], capsys)


def test_a_refused_run_leaves_the_configuration_as_it_is(
    grpo_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["fit", "--config", grpo_file, "--trainer.default_root_dir=kept"]
    run_trainer(flags)
    before = Path("kept/config.yaml").read_bytes()
    Path("text.ckpt").write_text("not a checkpoint")
    refusal([*flags, "--ckpt_path=text.ckpt", "--model.kl.coef=0.5"], capsys)
    refusal([*flags, "--trainer.accumulate_grad_batches=5"], capsys)
    assert Path("kept/config.yaml").read_bytes() == before


CONSTRUCTION = [
    (["--data.sampling.temperature=0"], "sampling.temperature is 0"),
    (["--data.phase.steps=3"], "phase.steps is 3"),
    (["--model.kl.coef=-1"], "kl.coef is -1"),
    (["--model.model=./nowhere"], "'./nowhere', which is not a folder"),
    (["--trainer.max_steps=3"], "with both"),
    (["--data.rewards=[math.sqrtt]"], "sqrtt"),
    (["--data.rewards=[MathRewrd]"], "Did you mean MathReward?"),
    (["--trainer.accelerator=gpu"], "gpu"),
]


@pytest.mark.parametrize(("flags", "message"), CONSTRUCTION, ids=[c[0][0] for c in CONSTRUCTION])
def test_mistakes_that_constructors_and_setup_find(
    flags: list[str], message: str, grpo_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "gpu" in message and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert message in refusal(["fit", "--config", grpo_file, *flags], capsys)


def test_debugging_shows_the_traceback(grpo_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_LIGHTNING_DEBUG", "1")
    with pytest.raises(ValueError, match=r"kl\.coef is -1"):
        main(["fit", "--config", grpo_file, "--model.kl.coef=-1"])


def test_a_crash_in_training_keeps_its_traceback(grpo_file: str) -> None:
    with pytest.raises(ValueError, match="in the middle"):
        main(["fit", "--config", grpo_file, f"--trainer.callbacks+={__name__}.Crash"])


def test_sigterm_is_no_success_and_last_goes_on_from_there(
    grpo_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fit", "--config", grpo_file, "--trainer.logger=CSVLogger"]
    command += ["--trainer.logger.save_dir=logs", "--trainer.enable_checkpointing=true"]
    with pytest.raises(SystemExit) as exit:
        main([*command, f"--trainer.callbacks+={__name__}.Terminate"])
    assert exit.value.code == 128 + signal.SIGTERM
    assert "stopped at step 1; go on with ckpt_path=" in capsys.readouterr().err
    cli = run_trainer([*command, "--ckpt_path=last", f"--trainer.callbacks+={__name__}.Steps"])
    (steps,) = [c.steps for c in cli.trainer.callbacks if isinstance(c, Steps)]
    assert steps == [1]


class Steps(RolloutCallback):
    """Which steps a run does."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append(trainer.global_step)


class Crash(RolloutCallback):
    """A defect of somebody's callback."""

    def on_rollout_end(self, *args: Any) -> None:
        raise ValueError("in the middle")


class Terminate(RolloutCallback):
    """A scheduler that wants its machine back."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_validate_predict_and_test(grpo_file: str) -> None:
    for command, metric in (("validate", "eval/accuracy"), ("test", "test/accuracy")):
        cli = run_trainer([command, "--config", grpo_file])
        assert metric in cli.trainer.callback_metrics
    assert main(["predict", "--config", grpo_file]) == 0
