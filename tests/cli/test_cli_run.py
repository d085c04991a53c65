from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file

from rlhf_lightning.cli import run as run_module
from rlhf_lightning.cli.main import main
from rlhf_lightning.cli.recipe import RecipeError, read_recipe
from rlhf_lightning.cli.report import last_samples, print_report, samples_table
from rlhf_lightning.cli.run import Marker, run_recipe
from rlhf_lightning.cli.text import printable
from rlhf_lightning.events import RolloutCallback

EXPORT = {"class_path": "HFExport", "init_args": {"folder": "${output}/export"}}
SUMMARY = {"accuracy": "${stages.3_eval.metrics.eval/accuracy}"}


def write_recipe(folder: Path, stages: dict[str, Any], **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in stages.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (folder / "run.yaml").write_text(yaml.safe_dump({"defaults": {"seed": 0}, **options}))
    return folder


class Recorder:
    """Stands in for the Trainer: notes the calls, and fails or writes as it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, bool]] = []
        self.fail_in = ""

    def __call__(self, command: str, config: Path, resume: bool) -> dict[str, float]:
        stage = config.parent
        self.calls.append((command, stage.name, resume))
        (stage / "last.ckpt").touch()
        (stage / "export").mkdir(exist_ok=True)
        if stage.name == self.fail_in:
            raise RuntimeError("the machine went away")
        return {"eval/accuracy": float(len(self.calls))}


@pytest.fixture
def recipe_folder(in_tmp: Path) -> Path:
    stages = {
        "1_sft": {"trainer": {"callbacks": [EXPORT], "max_epochs": 1}},
        "2_grpo": {"trainer": {"callbacks": [EXPORT]}, "model": "${stages.1_sft.export}"},
        "3_eval": {"validate": {"model": "${stages.2_grpo.export}"}},
    }
    return write_recipe(in_tmp / "recipe", stages, summary=SUMMARY)


def test_stages_run_in_order_and_only_once(
    recipe_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    execute = Recorder()
    summary = run_recipe(read_recipe(recipe_folder), Path("out"), execute)
    order = [("fit", "1_sft", False), ("fit", "2_grpo", False), ("validate", "3_eval", False)]
    assert execute.calls == order
    assert summary["accuracy"] == 3.0
    assert json.loads(Path("out/summary.json").read_text()) == summary
    assert run_recipe(read_recipe(recipe_folder), Path("out"), execute) == summary
    assert execute.calls == order
    assert capsys.readouterr().out.count("done before, skipped") == 3


def test_seconds_are_those_of_all_stages(recipe_folder: Path) -> None:
    run_recipe(read_recipe(recipe_folder), Path("out"), Recorder())
    for seconds, stage in ((1.5, "1_sft"), (2.0, "2_grpo"), (4.0, "3_eval")):
        marker = Marker.read(Path("out") / stage)
        assert marker is not None
        marker.seconds = seconds
        marker.write(Path("out") / stage)
    assert run_recipe(read_recipe(recipe_folder), Path("out"), Recorder())["seconds"] == 7.5


def test_a_changed_stage_and_those_after_it_run_again(recipe_folder: Path) -> None:
    execute = Recorder()
    run_recipe(read_recipe(recipe_folder), Path("out"), execute)
    execute.calls.clear()
    changed = read_recipe(recipe_folder, ["2_grpo.trainer.max_epochs=7"])
    run_recipe(changed, Path("out"), execute)
    # nothing of the old configuration is resumed: its checkpoint lies elsewhere now
    assert execute.calls == [("fit", "2_grpo", False), ("validate", "3_eval", False)]
    kept = sorted(path.name.rpartition("-")[0] for path in Path("out/.earlier").iterdir())
    assert kept == ["2_grpo", "3_eval"]


def test_a_failed_stage_stops_the_run_and_is_resumed(
    recipe_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    execute = Recorder()
    execute.fail_in = "2_grpo"
    with pytest.raises(RuntimeError, match="went away"):
        run_recipe(read_recipe(recipe_folder), Path("out"), execute, "the command")
    shown = capsys.readouterr().err
    assert "2_grpo did not finish. Its output is in out/2_grpo" in shown
    assert "To go on from there: the command" in shown
    assert not Path("out/summary.json").exists()
    failed = Marker.read(Path("out/2_grpo"))
    assert failed is not None
    failed.seconds = 100.0
    failed.write(Path("out/2_grpo"))
    execute.calls.clear()
    execute.fail_in = ""
    summary = run_recipe(read_recipe(recipe_folder), Path("out"), execute)
    assert execute.calls == [("fit", "2_grpo", True), ("validate", "3_eval", False)]
    assert 100.0 <= summary["seconds"] < 101.0


def test_a_folder_of_somebody_else_is_left_alone(recipe_folder: Path) -> None:
    precious = Path("out/2_grpo/thesis.txt")
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    with pytest.raises(RecipeError, match="not made by `run`"):
        run_recipe(read_recipe(recipe_folder), Path("out"), Recorder())
    assert precious.read_text() == "mine"


def test_a_kill_before_the_first_marker_is_there(recipe_folder: Path) -> None:
    torn = Path("out/1_sft/.stage.json.partial")
    torn.parent.mkdir(parents=True)
    torn.write_text('{"dig')
    execute = Recorder()
    run_recipe(read_recipe(recipe_folder), Path("out"), execute)
    assert execute.calls[0] == ("fit", "1_sft", False)


def test_a_figure_that_does_not_exist(recipe_folder: Path) -> None:
    summary = {"accuracy": "${stages.3_eval.metrics.eval/acuracy}"}
    (recipe_folder / "run.yaml").write_text(yaml.safe_dump({"summary": summary}))
    with pytest.raises(RecipeError, match="no metric 'eval/acuracy'. Did you mean: eval/accuracy"):
        run_recipe(read_recipe(recipe_folder), Path("out"), Recorder())


def test_mistakes_end_with_status_2(
    recipe_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["run", "no/such/folder"]) == 2
    assert main(["run", str(recipe_folder), "--set", "sed=1"]) == 2
    assert "Did you mean: seed?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main(["run", str(recipe_folder), "--outptu", "x"])
    assert exit.value.code == 2
    Path("file").touch()
    assert main(["run", str(recipe_folder), "--output", "file/out"]) == 2
    assert "--output file/out: cannot be made" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", str(recipe_folder)]) == 2
    assert "fit --config" in capsys.readouterr().err


def test_a_mistake_in_the_last_stage_is_found_before_the_first_runs(
    in_tmp: Path,
    grpo_config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = {**grpo_config, "trainer": {"max_epoch": 1}}
    folder = write_recipe(in_tmp / "recipe", {"1_first": grpo_config, "2_second": wrong})
    execute = Recorder()
    monkeypatch.setattr(run_module, "_execute", execute)
    with pytest.raises(SystemExit) as exit:
        main(["run", str(folder)])
    assert exit.value.code == 2
    shown = capsys.readouterr().err
    assert "no option trainer.max_epoch. Did you mean: max_epochs?\n(in stage 2_second)" in shown
    assert execute.calls == []


class CrashAt(RolloutCallback):
    """Fails in a phase, as long as a file is there."""

    def __init__(self, phase: int, file: str) -> None:
        self.phase = phase
        self.file = Path(file)

    def on_rollout_end(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any
    ) -> None:
        if batch.policy_version == self.phase and self.file.exists():
            raise RuntimeError("out of luck")


@pytest.fixture
def real_recipe(in_tmp: Path, grpo_config: dict[str, Any]) -> Path:
    """SFT, GRPO with a crash, evaluation: two steps each."""
    trainer = {**grpo_config["trainer"], "enable_checkpointing": True}
    checkpoint = {
        "class_path": "ModelCheckpoint",
        "init_args": {"dirpath": "${output}/checkpoints", "every_n_epochs": 1, "save_last": True},
    }
    crash = {"class_path": f"{__name__}.CrashAt", "init_args": {"phase": 2, "file": "crash"}}
    log = {"class_path": "SampleLogger", "init_args": {"path": "${output}/samples.jsonl"}}
    prompts = grpo_config["data"]["init_args"]["prompts"]
    model = grpo_config["model"]["init_args"]["model"]
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    grpo = {
        **grpo_config,
        "seed_everything": "${seed}",
        "trainer": {**trainer, "max_epochs": 4, "callbacks": [checkpoint, crash, log, EXPORT]},
    }
    grpo["model"]["init_args"]["model"] = {"path": "${stages.1_sft.export}"}
    grpo["model"]["init_args"]["optimizer"] = optimizer
    # a random model is never right, but its answers differ in length
    grpo["data"]["init_args"]["rewards"] = [f"{__name__}.length_reward"]
    evaluation = json.loads(json.dumps(grpo))
    evaluation["trainer"] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    evaluation["model"]["init_args"]["model"] = {"path": "${stages.2_grpo.export}"}
    sft = {
        "trainer": {**trainer, "max_epochs": 1, "callbacks": [checkpoint, EXPORT]},
        "model": {"class_path": "SFTModule", "init_args": {"model": model}},
        "data": {"class_path": "SFTDataModule", "init_args": {"dataset": prompts, "batch_size": 4}},
    }
    return write_recipe(
        in_tmp / "recipe",
        {"1_sft": sft, "2_grpo": grpo, "3_eval": {"validate": evaluation}},
        summary={"reward": "${stages.3_eval.metrics.eval/reward}"},
        next=["celebrate"],
    )


def length_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    real_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(real_recipe), "--output", "whole"]) == 0
    shown = capsys.readouterr().out
    assert "celebrate" in shown
    assert "whole/2_grpo/samples.jsonl" in shown
    assert "whole/2_grpo/export" in shown
    Path("crash").touch()
    with pytest.raises(RuntimeError, match="out of luck"):
        main(["run", str(real_recipe), "--output", "broken"])
    assert "rlhf-lightning run" in capsys.readouterr().err
    Path("crash").unlink()
    assert main(["run", str(real_recipe), "--output", "broken"]) == 0
    shown = capsys.readouterr().out
    assert "1_sft: done before, skipped" in shown
    assert "2_grpo: resumed" in shown
    whole, broken = (json.loads(Path(o, "summary.json").read_text()) for o in ("whole", "broken"))
    assert whole["reward"] == broken["reward"]
    weights = [load_file(f"{o}/2_grpo/export/model.safetensors") for o in ("whole", "broken")]
    start = load_file("whole/1_sft/export/model.safetensors")
    assert any(not weights[0][name].equal(start[name]) for name in start)
    assert all(weights[0][name].equal(weights[1][name]) for name in start)
    samples = Path("broken/2_grpo/samples.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in samples]
    assert steps == sorted(steps)
    assert set(steps) == {0, 1, 2, 3}


def test_a_kill_between_the_last_checkpoint_and_the_export(real_recipe: Path) -> None:
    only_sft = real_recipe.parent / "only_sft"
    write_recipe(only_sft, {"1_sft": yaml.safe_load((real_recipe / "1_sft.yaml").read_text())})
    assert main(["run", str(only_sft), "--output", "out"]) == 0
    stage = Path("out/1_sft")
    before = load_file(stage / "export/model.safetensors")
    shutil.rmtree(stage / "export")
    marker = Marker.read(stage)
    assert marker is not None
    marker.done = False
    marker.write(stage)
    assert main(["run", str(only_sft), "--output", "out"]) == 0
    after = load_file(stage / "export/model.safetensors")
    assert all(before[name].equal(after[name]) for name in before)


def test_samples_are_inert_on_a_terminal(recipe_folder: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2Jok\u202e\r\n\t"
    assert printable(evil).isprintable()
    assert "ok" in printable(evil)
    assert len(printable("x" * 500)) == 48
    assert printable("plain") == "plain"
    table = samples_table(
        [
            {"prompt": [{"role": "user", "content": evil}], "completion": evil, "reward": 0.5},
            {"prompt": "1+1=", "completion": "2", "reward": None},
        ]
    )
    assert "\x1b" not in table
    assert table.splitlines()[-1].split() == ["1+1=", "2", "none"]


def test_samples_come_from_the_last_stage_that_has_some(recipe_folder: Path) -> None:
    recipe = read_recipe(recipe_folder)
    assert last_samples(recipe, Path("out")) is None
    for stage, text in (("1_sft", "early"), ("2_grpo", "late")):
        file = Path("out") / stage / "logs" / "samples.jsonl"
        file.parent.mkdir(parents=True)
        lines = [{"prompt": p, "completion": text + c} for p in "ab" for c in "12"]
        file.write_text("\n".join(map(json.dumps, lines)) + '\n{"torn')
    found = last_samples(recipe, Path("out"))
    assert found is not None
    assert [sample["completion"] for sample in found[1]] == ["late2", "late2"]
    assert [sample["prompt"] for sample in found[1]] == ["a", "b"]


def test_a_recipe_without_samples_or_summary_is_reported(
    recipe_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(read_recipe(recipe_folder), Path("out"), {"seconds": 1.0})
    assert "seconds" in capsys.readouterr().out


def test_a_figure_that_is_no_number_is_null_in_files(tmp_path: Path) -> None:
    Marker("digest", done=True, metrics={"loss": math.nan, "reward": 0.5}).write(tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads((tmp_path / "stage.json").read_text(), parse_constant=refuse)
    marker = Marker.read(tmp_path)
    assert marker is not None
    assert math.isnan(marker.metrics["loss"])
    assert marker.metrics["reward"] == 0.5
