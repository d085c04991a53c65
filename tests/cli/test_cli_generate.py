from __future__ import annotations

import dataclasses
import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.cli import generation
from rlhf_lightning.cli.arguments import SAMPLING
from rlhf_lightning.cli.generation import Request
from rlhf_lightning.cli.main import main
from rlhf_lightning.data.prompts import EncodedPrompt
from rlhf_lightning.rollout.hf import HFEngine
from rlhf_lightning.types import SamplingParams

ROWS = [{"question": f"{a}+{b}", "answer": str(a + b)} for a in range(3) for b in range(3)]


@pytest.fixture
def prompts(in_tmp: Path) -> str:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return "rows.jsonl"


def generate(*arguments: object) -> int:
    return main(["generate", *map(str, arguments)])


def records(path: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What is said where the command refuses, which it does before weights are read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_lightning.cli.policy.load_causal_lm", None)
        with pytest.raises(SystemExit) as exit:
            generate(*arguments)
    assert exit.value.code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown


def batch(prompts: str, model: Path) -> list[object]:
    """Nine prompts in several batches."""
    return [
        *("--model", model, "--prompts", prompts, "--template", "{question}="),
        *("--n", 2, "--max_new_tokens", 4, "--batch_tokens", 40, "--output", "out.jsonl"),
    ]


def test_sampling_options_are_those_of_the_engine() -> None:
    """Names, types and defaults stand twice, because the help must not import torch."""
    fields = {field.name: field for field in dataclasses.fields(SamplingParams)}
    assert list(fields) == list(SAMPLING)
    assert [field.default for field in fields.values()] == [row[1] for row in SAMPLING.values()]


def test_rows_of_a_file(prompts: str, model_folder: Path) -> None:
    assert generate(*batch(prompts, model_folder)) == 0
    found = records()
    assert [record["id"] for record in found] == [f"{i}-{s}" for i in range(9) for s in range(2)]
    for record in found:
        row = ROWS[int(record["id"].partition("-")[0])]
        assert record["prompt"] == f"{row['question']}="
        assert record["columns"] == row
        assert record["prompt_length"] == 4
        assert 1 <= record["completion_length"] <= 4
        assert record["finish_reason"] in ("stop", "length")
        assert record["mean_logprob"] < 0


def test_completions_follow_from_seed_and_weights_alone(prompts: str, model_folder: Path) -> None:
    """Not from the size of the batches, nor from how many completions there are beside them."""
    generate(*batch(prompts, model_folder))
    alone = ["--batch_tokens", 1, "--n", 1, "--output", "alone.jsonl"]
    generate(*batch(prompts, model_folder), *alone)
    texts = [record["completion"] for record in records()]
    assert [record["completion"] for record in records("alone.jsonl")] == texts[::2]
    generate(*batch(prompts, model_folder), "--seed", 1, "--output", "other.jsonl")
    assert [record["completion"] for record in records("other.jsonl")] != texts


@pytest.mark.parametrize("left", [b"", b"\n", b'{"id": "3-0", "prom'])
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    left: bytes, prompts: str, model_folder: Path
) -> None:
    generate(*batch(prompts, model_folder))
    whole = Path("out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    Path("out.jsonl").write_bytes(b"".join(lines[:5]) + left)
    assert generate(*batch(prompts, model_folder)) == 0
    assert Path("out.jsonl").read_bytes().replace(b"\n\n", b"\n") == whole


def test_what_is_there_is_not_generated_again(
    prompts: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(*batch(prompts, model_folder))
    before = Path("out.jsonl").read_bytes()
    asked: list[int] = []

    def count(self: HFEngine, prompts: Any, *rest: Any, **kwargs: Any) -> Any:
        asked.append(len(prompts))
        return unchanged(self, prompts, *rest, **kwargs)

    unchanged = HFEngine.generate
    monkeypatch.setattr(HFEngine, "generate", count)
    generate(*batch(prompts, model_folder))
    assert asked == []
    assert Path("out.jsonl").read_bytes() == before
    generate(*batch(prompts, model_folder), "--n", 3)  # the first two of each stay as they are
    assert sum(asked) == 9
    new = records()
    assert new[:18] == [json.loads(line) for line in before.splitlines()]
    assert [record["id"] for record in new[18:]] == [f"{i}-2" for i in range(9)]


def test_an_interrupted_run_says_how_to_go_on(
    prompts: str,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "run", interrupt)
    assert generate(*batch(prompts, model_folder)) == 128 + signal.SIGINT
    assert "the same command goes on" in capsys.readouterr().err


OTHERWISE = [
    (["--temperature", "0.5"], "temperature was 1.0 and is 0.5"),
    (["--seed", "3"], "seed was 0 and is 3"),
    (["--template", "{question}+="], "the prompt of 0-0 was '0+0=' and is '0+0+='"),
    (["--dtype", "bfloat16"], "dtype was 'auto' and is 'bfloat16'"),
]


@pytest.mark.parametrize(("change", "message"), OTHERWISE, ids=[o[0][0] for o in OTHERWISE])
def test_a_file_is_not_continued_with_other_settings(
    change: list[str],
    message: str,
    prompts: str,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    generate(*batch(prompts, model_folder))
    before = Path("out.jsonl").read_bytes()
    capsys.readouterr()
    shown = refusal(capsys, *batch(prompts, model_folder), *change)
    assert message in shown
    assert Path("out.jsonl").read_bytes() == before


def test_a_file_is_not_continued_with_other_weights(
    prompts: str, model_folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(*batch(prompts, model_folder))
    other = [str(a) for a in batch(prompts, model_folder)]
    other[:2] = ["--ckpt", str(checkpoint)]
    with pytest.raises(SystemExit):
        generate(*other)
    assert "weights was" in capsys.readouterr().err


def test_rows_of_another_program_are_not_continued(
    prompts: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out.jsonl").write_text('{"id": 1, "text": "mine"}\n')
    assert "did not write" in refusal(capsys, *batch(prompts, model_folder))
    assert Path("out.jsonl").read_text() == '{"id": 1, "text": "mine"}\n'


REFUSED = [
    (["--output", "rows.jsonl/deep/out.jsonl"], "--output: rows.jsonl/deep cannot be written to"),
    (["--output", "."], "--output: . is a folder"),
    (["--prompts", "no.jsonl"], "no.jsonl does not exist"),
    (["--template", "{nothing}"], "template needs the column 'nothing'"),
    (["--template", "{question"], "template is malformed"),
    (["--column", "nothing"], "columns needs the column 'nothing'"),
    (["--limit", "0"], "limit is 0"),
    (["--temperature", "-1"], "sampling.temperature is -1.0; it must be 0"),
    (["--temperature", "0"], "0 (greedy) with n=2"),
    (["--max_new_tokens", "64"], "leave no room for --max_new_tokens 64"),
    (["--max_new_tokens", "61"], "9 of 9 prompts (rows 1, 2, 3"),
    (["--batch_tokens", "0"], "max_batch_tokens is 0"),
    (["--device", "nowhere"], "--device nowhere"),
    (["--model", "./nowhere"], "'./nowhere', which is not a folder"),
    (["--prompt", "1+1="], "--prompt and --prompts are both given"),
    (["--max-new-tokens", "3"], "Did you mean: --max_new_tokens?"),
    (["--temprature", "3"], "Did you mean: --temperature?"),
    (["--top_k", "many"], "argument --top_k: invalid int value: 'many'"),
    (["--ckpt", "no.ckpt"], "no.ckpt: there is no such checkpoint"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[" ".join(r[0]) for r in REFUSED])
def test_bad_input_is_refused_before_weights_are_read(
    change: list[str],
    message: str,
    prompts: str,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refusal(capsys, *batch(prompts, model_folder), *change)


def test_prompts_that_are_too_long_are_left_out_and_named(
    in_tmp: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["--prompt", "1" * 70, "--prompt", "1+1="]
    options = ["--max_new_tokens", 4, "--too_long", "drop", "--output", "out.jsonl"]
    assert generate("--model", model_folder, *texts, *options) == 0
    assert "prompts: 1 of 2 dropped: too long (row 1)" in capsys.readouterr().err
    (record,) = records()
    texts = ["--prompt", "1", "--prompt", "1+1=", "--output", "both.jsonl"]
    assert generate("--model", model_folder, *texts, "--max_new_tokens", 4) == 0
    same = records("both.jsonl")[1]  # its row, not its place, decides
    assert (same["id"], same["completion"]) == (record["id"], record["completion"])


def test_a_model_of_nan_is_no_success(
    in_tmp: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rlhf_lightning.cli import policy

    def spoilt(*arguments: Any) -> Any:
        model = unspoilt(*arguments)
        torch.nn.init.constant_(model.lm_head.weight, torch.nan)
        return model

    unspoilt = policy.load_causal_lm
    monkeypatch.setattr(policy, "load_causal_lm", spoilt)
    with pytest.raises(SystemExit) as exit:
        generate("--model", model_folder, "--prompt", "1+1=", "--max_new_tokens", 2)
    assert exit.value.code == 2
    assert "not numbers" in capsys.readouterr().err


def test_a_checkpoint_chat_and_standard_input(
    in_tmp: Path,
    checkpoint: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("1+2=\n\n3+4=\n"))
    options = ["--max_new_tokens", 3, "--temperature", 0]
    assert generate("--ckpt", checkpoint, *options) == 0
    shown = capsys.readouterr().out
    assert "[0-0] 1+2=" in shown
    assert "[1-0] 3+4=" in shown
    talk = ["--prompt", "1+2", "--chat", "--system", "0", "--output", "-"]
    assert generate("--model", model_folder, *talk, *options) == 0
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert [message["role"] for message in record["prompt"]] == ["system", "user"]
    assert record["prompt_length"] == len("0=1+2=")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert "standard input has no prompts" in refusal(capsys, "--model", model_folder)
    assert "--split is about the file" in refusal(
        capsys, "--model", model_folder, "--prompt", "1", "--split", "x"
    )
    assert "give --model" in refusal(capsys, "--prompt", "1+1")


def test_control_characters_reach_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from rlhf_lightning.cli.answers import Terminal

    text = "a\x1b[2Jb\r\x07\u202ec\x9b\nd"
    record = {"id": "0-0", "prompt": text, "completion": text, "completion_length": 3}
    for output in (None, Path("-")):
        Terminal(output).write([{**record, "finish_reason": "stop"}])
        shown = capsys.readouterr().out
        assert not set(shown) & set("\x1b\r\x07\u202e\x9b")
        assert "x1b" in shown or "u001b" in shown


@pytest.mark.parametrize("budget", [1, 20, 55, 1000])
def test_batches_keep_to_the_budget_and_the_order(budget: int) -> None:
    prompts = [EncodedPrompt([1] * length, {"prompt": ""}) for length in (3, 9, 1, 1, 4, 12, 2)]
    sampling = SamplingParams(n=2, max_new_tokens=5)
    request = Request(prompts, range(7), None, sampling, 0, budget)  # type: ignore[arg-type]
    batches = list(request.batches())
    assert [place for places in batches for place in places] == list(range(7))
    for places in batches:
        rows = len(places) * 2 * (max(len(prompts[i].ids) for i in places) + 5)
        assert rows <= budget or len(places) == 1
