from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lightning.cli.main import main
from rlhf_lightning.cli.outputs import write_json
from rlhf_lightning.cli.trainer import run_trainer
from rlhf_lightning.io.jsonl import plain
from rlhf_lightning.types import RewardResult


def evaluate(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit:
        evaluate(*arguments)
    assert exit.value.code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown


def metrics(folder: str = "report") -> dict[str, Any]:
    return json.loads(Path(folder, "metrics.json").read_text())


def samples(folder: str = "report") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


def test_figures_are_those_of_validation(
    grpo_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--config", grpo_file, "--output", "report") == 0
    shown = capsys.readouterr().out
    assert "the model that training starts from" in shown
    found = metrics()
    assert found.pop("seconds") > 0
    expected = run_trainer(["validate", "--config", grpo_file]).trainer.callback_metrics
    assert found == {name: float(value) for name, value in expected.items()}
    for name, value in found.items():
        assert re.search(rf"{re.escape(name)} +{re.escape(f'{value:.4g}')}", shown)
    assert not Path("outputs").exists()  # and no run's folder is touched


def test_every_answer_is_kept_under_its_row(grpo_file: str) -> None:
    sampling = "--data.validation.sampling"
    options = [f"{sampling}.n=3", f"{sampling}.max_new_tokens=3", "--data.validation.batch_size=3"]
    rows = "--data.validation.prompts.size=8"
    evaluate("--config", grpo_file, *options, rows, "--output=report")
    found = samples()
    assert [sample["id"] for sample in found] == [
        f"{row}-{n}" for row in range(8) for n in range(3)
    ]
    mean = sum(sample["reward"] for sample in found) / 24
    assert metrics()["eval/reward"] == pytest.approx(mean)
    assert {sample["columns"]["answer"] for sample in found}
    evaluate("--config", grpo_file, "--output", "report")  # replaces the earlier report
    assert len(samples()) == 2


def test_a_checkpoint_and_last(grpo_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    lasting = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=ckpt"]
    lasting += ["--trainer.callbacks.save_last=true", "--trainer.enable_checkpointing=true"]
    rate = ["--model.optimizer=AdamW", "--model.optimizer.lr=1"]
    rate += [f"--data.rewards=[{__name__}.likes_ones]"]
    assert "has left one" in refusal(capsys, "--config", grpo_file, *lasting, "--ckpt_path=last")
    run_trainer(["fit", "--config", grpo_file, *lasting, *rate])
    capsys.readouterr()
    completions = []
    for path in (["--ckpt_path", "last"], ["--ckpt_path", "ckpt/last.ckpt"], []):
        evaluate("--config", grpo_file, *lasting, *path, "--output", "report")
        assert ("ckpt/last.ckpt" in capsys.readouterr().out) == bool(path)
        completions.append([sample["completion"] for sample in samples()])
    assert completions[0] == completions[1] != completions[2]


def test_supervised_recipes_have_figures_and_no_samples(
    grpo_config: dict[str, Any], in_tmp: Path
) -> None:
    rows = {"class_path": "ArithmeticPrompts", "init_args": {"size": 4, "digits": 1}}
    model = grpo_config["model"]["init_args"]["model"]
    config = {
        "trainer": grpo_config["trainer"],
        "model": {"class_path": "SFTModule", "init_args": {"model": model}},
        "data": {"class_path": "SFTDataModule", "init_args": {"dataset": rows, "validation": rows}},
    }
    Path("sft.yaml").write_text(yaml.safe_dump(config))
    Path("report").mkdir()
    Path("report/samples.jsonl").write_text("{}\n")  # of another evaluation
    assert evaluate("--config", "sft.yaml", "--output", "report") == 0
    assert metrics()["eval/loss"] > 0
    assert not Path("report/samples.jsonl").exists()


def likes_ones(completions: list[str], **columns: Any) -> list[float]:
    return [float("1" in text) + len(text) / 7 for text in completions]


def no_opinion(completions: list[str], **columns: Any) -> list[None]:
    return [None] * len(completions)


def odd_details(completions: list[str], **columns: Any) -> list[RewardResult]:
    details = {"ratio": float("inf"), "folder": Path("a/b"), "text": "\ud800"}
    return [RewardResult(0.5, details=details) for _ in completions]


@pytest.mark.parametrize("reward", [no_opinion, odd_details])
def test_files_hold_finite_json(reward: Any, grpo_file: str) -> None:
    name = f"--data.rewards=[{__name__}.{reward.__name__}]"
    assert evaluate("--config", grpo_file, name, "--output", "report") == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for path in Path("report").iterdir():
        for line in [path.read_text()] if path.suffix == ".json" else path.open():
            json.loads(line, parse_constant=refuse)


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [float("-inf"), 1, True, None, "x"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "a": None,
        "b": [None, 1, True, None, "x"],
    }
    assert plain(True) is True


def test_a_value_is_not_taken_for_a_misspelt_option(
    grpo_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--trainer.default_root_dir", "outputs", "--ckpt_path", "no.ckpt"]
    assert "there is no checkpoint 'no.ckpt'" in refusal(capsys, "--config", grpo_file, *options)


REFUSED = [
    (["--outptu", "x"], "Did you mean: --output?"),
    (["--output", "grpo.yaml/report"], "--output: grpo.yaml/report cannot be written to"),
    (["--ckpt_path", "no.ckpt"], "there is no checkpoint 'no.ckpt'"),
    (["--data.validation", "null"], "validation: evaluating needs held-out prompts"),
    (["--model.kl.coeff", "1"], "Did you mean: coef?"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[r[0][0] for r in REFUSED])
def test_bad_input(
    arguments: list[str], message: str, grpo_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, "--config", grpo_file, *arguments)
