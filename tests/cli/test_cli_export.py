from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.cli.main import main


def export(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit:
        export(*arguments)
    assert exit.value.code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_folder_is_a_hugging_face_model(
    dtype: str, checkpoint: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("--ckpt", checkpoint, "--output", "deep/model", "--dtype", dtype) == 0
    said = capsys.readouterr().out
    kind = torch.float32 if dtype == "auto" else torch.bfloat16
    assert "SFTModule after 6 steps" in said
    assert str(kind).removeprefix("torch.") in said
    model = AutoModelForCausalLM.from_pretrained("deep/model")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[f"policy.model.{name}"].to(kind))
    assert model.dtype == kind
    tokenizer = AutoTokenizer.from_pretrained("deep/model")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("12+3=").input_ids) == "12+3="
    # and the project's own tool takes it
    assert (
        main(["generate", "--model", "deep/model", "--prompt", "1+1=", "--max_new_tokens", "3"])
        == 0
    )


def test_an_earlier_export_is_replaced_and_nothing_else(
    checkpoint: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export("--ckpt", checkpoint, "--output", "model")
    export("--ckpt", checkpoint, "--output", "model", "--dtype", "bfloat16")
    assert json.loads(Path("model/config.json").read_text())["dtype"] == "bfloat16"
    assert "model/config.json is a file" in refusal(
        capsys, "--ckpt", checkpoint, "--output", "model/config.json"
    )
    Path("model/notes.txt").write_text("mine")
    assert "notes.txt" in refusal(capsys, "--ckpt", checkpoint, "--output", "model")
    assert Path("model/notes.txt").read_text() == "mine"


def test_weights_that_are_not_finite_are_not_exported(
    checkpoint: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["policy.model.model.norm.weight"][3] = torch.nan
    torch.save(content, "nan.ckpt")
    assert "model.norm.weight" in refusal(capsys, "--ckpt", "nan.ckpt", "--output", "model")
    assert not Path("model").exists()


REFUSED = [
    ([], "--ckpt, --output"),
    (["--ckpt", "no.ckpt", "--output", "model"], "no.ckpt: there is no such checkpoint"),
    (["--ckpt", "text.ckpt", "--output", "model"], "text.ckpt: this is no checkpoint"),
    (["--ckpt", ".", "--output", "model"], "give one checkpoint of it"),
    (["--ckpt", "no.ckpt", "--output", "text.ckpt/model"], "text.ckpt cannot be written to"),
    (["--ckpt", "http://x/y.ckpt", "--output", "model"], "not read from the web"),
    (["--ckpt", "no.ckpt", "--output", "model", "--dtype", "int8"], "invalid choice: 'int8'"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[r[1][:20] for r in REFUSED])
def test_bad_input(
    arguments: list[str], message: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.ckpt").write_text("not a checkpoint")
    assert message in refusal(capsys, *arguments)
    assert not Path("model").exists()
