from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from rlhf_lightning.algorithms import SFTModule
from rlhf_lightning.cli.callback_options import take_addressed
from rlhf_lightning.cli.main import main
from rlhf_lightning.cli.outputs import check_file, check_folder
from rlhf_lightning.cli.trainer import RLHFCLI, run_trainer
from rlhf_lightning.cli.yaml_files import read_yaml
from rlhf_lightning.rollout.hf import HFEngine

SAVED = ["--trainer.enable_checkpointing=true", "--trainer.callbacks+=ModelCheckpoint"]
SAVED += ["--trainer.callbacks.dirpath=ckpt", "--trainer.callbacks.save_last=true"]


def refusal(
    capsys: pytest.CaptureFixture[str], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    """What is said where a run is refused, which happens before anything is generated."""
    monkeypatch.setattr(HFEngine, "generate", None)
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown


def summary(shown: str) -> dict[str, str]:
    """Texts by label, lines that belong together joined."""
    texts: dict[str, str] = {}
    label = ""
    for line in shown.splitlines():
        if found := re.fullmatch(r"([a-z][a-z ]{0,10}?) {2,}(\S.*)", line):
            label = found[1]
            texts[label] = found[2]
        elif label and line.startswith(" " * 10):
            texts[label] += f" {line.strip()}"
    return texts


def test_what_is_going_to_happen(grpo_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.reward_weights=[0.5]", "--trainer.callbacks+=Throughput"]
    flags += ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    run_trainer(["fit", "--config", grpo_file, *SAVED, *flags])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    found = summary(shown)
    assert found["module"] == "rlhf_lightning.algorithms.grpo.GRPOModule"
    assert found["model"].startswith("transformers.models.llama.modeling_llama.LlamaForCausalLM")
    assert "11,424 parameters, float32, vocabulary 17, context 32" in found["model"]
    assert found["optimizer"] == "torch.optim.adamw.AdamW, learning rate 1e-06"
    assert found["data"] == "rlhf_lightning.data.rollout.RolloutDataModule"
    assert found["engine"] == "rlhf_lightning.rollout.hf.HFEngine"
    assert found["rewards"] == "rlhf_lightning.rewards.math.MathReward x 0.5"
    assert found["callbacks"].split() == [
        "rlhf_lightning.callbacks.throughput.Throughput",
        "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    ]
    assert found["prompts"] == "8, the longest 4 tokens; 2 held out"
    assert found["a phase"] == "2 prompts x 2 = 4 completions, at most 28 tokens"
    assert found["the run"] == "2 phases, 2 optimizer steps"
    assert found["devices"] == "1 process on cpu, precision 32-true"
    assert found["checkpoints"] == "ckpt, every 1 epoch"
    assert found["logs"].startswith("logs/lightning_logs")
    assert found["starts from"] == "the beginning"
    longer = ["--trainer.max_epochs=3", "--ckpt_path=last"]
    run_trainer(["fit", "--config", grpo_file, *SAVED, *longer])
    assert summary(capsys.readouterr().out)["starts from"] == "ckpt/last.ckpt"


def test_a_run_that_is_counted_in_steps(grpo_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["--trainer.max_epochs=-1", "--trainer.max_steps=3", "--data.phase.steps=2"]
    run_trainer(["fit", "--config", grpo_file, *steps])
    found = summary(capsys.readouterr().out)
    assert found["the run"] == "3 optimizer steps, 2 phases"
    assert found["its updates"] == "2 steps of 2 completions (the global batch)"
    assert found["checkpoints"] == "none"


def test_quiet(
    grpo_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_LIGHTNING_QUIET", "1")
    run_trainer(["fit", "--config", grpo_file])
    assert capsys.readouterr().out == ""


def test_a_module_and_data_of_the_users_own(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boring = "lightning.pytorch.demos.boring_classes."
    flags = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    flags += ["--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    run_trainer(
        ["fit", "--model", f"{boring}BoringModel", "--data", f"{boring}BoringDataModule", *flags]
    )
    found = summary(capsys.readouterr().out)
    assert found["module"] == f"{boring}BoringModel"
    assert found["the run"] == "1 epoch"


OUTPUTS = [
    (["ModelCheckpoint.dirpath", "file/ckpt"], "file/ckpt cannot be written to (Not a directory)"),
    (["SampleLogger.path", "file/a.jsonl"], "SampleLogger.path: file cannot be written to"),
    (["SampleLogger.path", "folder.jsonl"], "SampleLogger.path: folder.jsonl is a folder"),
    (["HFExport.folder", "file/export"], "file"),
]


@pytest.mark.parametrize(("option", "message"), OUTPUTS, ids=[" ".join(o[0]) for o in OUTPUTS])
def test_places_that_cannot_be_written(
    option: list[str],
    message: str,
    grpo_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also the sanity check's rollouts come after this."""
    Path("file").write_text("in the way")
    Path("folder.jsonl").mkdir()
    name, place = option
    kind, _, argument = name.partition(".")
    flags = ["--trainer.num_sanity_val_steps=2", "--trainer.enable_checkpointing=true"]
    flags += [f"--trainer.callbacks+={kind}", f"--trainer.callbacks.{argument}={place}"]
    assert message in refusal(capsys, ["fit", "--config", grpo_file, *flags], monkeypatch)


def test_logs_that_cannot_be_written(
    grpo_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("in the way")
    flags = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=file/logs"]
    said = refusal(capsys, ["fit", "--config", grpo_file, *flags], monkeypatch)
    assert "CSVLogger.save_dir: file/logs cannot be written to" in said
    flags = ["--trainer.default_root_dir=file/root"]
    said = refusal(capsys, ["fit", "--config", grpo_file, *flags], monkeypatch)
    assert "trainer.default_root_dir: " in said


def test_folders_may_have_a_dot_in_their_name(grpo_file: str) -> None:
    flags = ["--trainer.enable_checkpointing=true", "--trainer.callbacks+=ModelCheckpoint"]
    flags += ["--trainer.callbacks.dirpath=qwen2.5", "--trainer.max_epochs=1"]
    for _ in range(2):  # the second run finds the folder
        assert main(["fit", "--config", grpo_file, *flags]) == 0
    assert list(Path("qwen2.5").glob("*.ckpt"))


SIZES = [
    (["--data.sampling.max_new_tokens=64"], "leaves no room for a prompt"),
    (["--data.phase.max_tokens_per_micro_batch=27"], "accumulate_grad_batches to 2"),
    (["--data.phase.max_tokens_per_micro_batch=6"], "one row alone has 7 tokens"),
    (["--trainer.accumulate_grad_batches=5"], "has only 4 completions"),
    (["--trainer.limit_train_batches=1", "--trainer.accumulate_grad_batches=2"], "limit_train"),
]


@pytest.mark.parametrize(("flags", "message"), SIZES, ids=[s[0][0] for s in SIZES])
def test_sizes_that_would_fail_later(
    flags: list[str],
    message: str,
    grpo_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sanity = "--trainer.num_sanity_val_steps=2"
    arguments = ["fit", "--config", grpo_file, sanity, *flags]
    assert message in refusal(capsys, arguments, monkeypatch)


def test_checks_leave_nothing_behind(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b", "--output")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "kept").write_text("as it was")
    check_file(tmp_path / "kept", "--output")
    assert (tmp_path / "kept").read_text() == "as it was"
    with pytest.raises(OSError, match=r"--output: /proc/no/such cannot be written to"):
        check_folder("/proc/no/such", "--output")


# Options of callbacks


@pytest.fixture
def with_callbacks(grpo_file: str) -> str:
    config = read_yaml(Path(grpo_file))
    config["trainer"]["callbacks"] = [
        {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "ckpt"}},
        {"class_path": "SampleLogger", "init_args": {"path": "a.jsonl"}},
        "Throughput",
        "SampleLogger",
    ]
    Path(grpo_file).write_text(yaml.safe_dump(config))
    return grpo_file


def test_a_callback_is_addressed_by_its_class(with_callbacks: str) -> None:
    flags = ["--trainer.callbacks.ModelCheckpoint.every_n_train_steps", "20"]
    flags += ["--trainer.callbacks.ModelCheckpoint.save_last=true"]
    flags += ["--trainer.callbacks+=HFExport", "--trainer.callbacks.folder=export"]
    cli = RLHFCLI(["fit", "--config", with_callbacks, *flags], check_only=True)
    callbacks = cli.config.fit.trainer.callbacks
    assert callbacks[0].init_args.every_n_train_steps == 20
    assert callbacks[0].init_args.save_last is True
    assert callbacks[0].init_args.dirpath == "ckpt"
    assert callbacks[1].init_args.path == "a.jsonl"
    assert callbacks[4].init_args.folder == "export"


ADDRESSED = [
    (["--trainer.callbacks.dirpath=x"], "which callback is meant? Name its class, as in"),
    (["--trainer.callbacks.ModelCheckpont.dirpath=x"], "Did you mean: ModelCheckpoint?"),
    (["--trainer.callbacks.SampleLogger.path=x"], "the configuration has 2 callbacks SampleLogger"),
    (["--trainer.callbacks.HFExport.folder=x"], "has 0 callbacks HFExport"),
    (["--trainer.callbacks.ModelCheckpoint.dirpth=x"], "Did you mean: dirpath?"),
    (["--trainer.callbacks.ModelCheckpoint.every_n_epochs=x"], "expected int, got 'x'"),
    (["--trainer.callbacks.ModelCheckpoint.dirpath"], "give it a value"),
]


@pytest.mark.parametrize(("flags", "message"), ADDRESSED, ids=[a[0][0][20:] for a in ADDRESSED])
def test_callbacks_that_cannot_be_addressed(
    flags: list[str],
    message: str,
    with_callbacks: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert message in refusal(capsys, ["fit", "--config", with_callbacks, *flags], monkeypatch)


def test_other_arguments_are_left_alone() -> None:
    arguments = ["fit", "--config", "a", "--trainer.callbacks.help", "HFExport", "--x=y=z"]
    assert take_addressed(arguments) == (arguments, [])
    added = ["--trainer.callbacks+=A", "--trainer.callbacks.b.c=1"]
    assert take_addressed(added) == (added, [])


def test_rows_that_are_too_few_are_found_before_the_sanity_check(
    grpo_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_yaml(Path(grpo_file))
    rows = {"class_path": "ArithmeticPrompts", "init_args": {"size": 4, "digits": 1}}
    model = config["model"]["init_args"]["model"]
    config["model"] = {"class_path": "SFTModule", "init_args": {"model": model}}
    config["data"] = {
        "class_path": "SFTDataModule",
        "init_args": {"dataset": rows, "validation": rows, "batch_size": 2},
    }
    Path("sft.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(SFTModule, "evaluation_step", None)
    flags = ["--trainer.num_sanity_val_steps=2", "--trainer.accumulate_grad_batches=3"]
    assert "too few for 1 processes x accumulate_grad_batches=3" in refusal(
        capsys, ["fit", "--config", "sft.yaml", *flags], monkeypatch
    )
