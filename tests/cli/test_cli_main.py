from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from rlhf_lightning.cli.main import COMMANDS, main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name}" in shown
        assert command.summary in shown


def test_no_command_shows_the_help_and_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: rlhf-lightning" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split()[1] == version("rlhf-lightning")


@pytest.mark.parametrize(
    ("typo", "meant"), [("fti", "fit"), ("runn", "run"), ("valdate", "validate")]
)
def test_command_typo_names_the_nearest(
    typo: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([typo]) == 2
    assert f"Did you mean: {meant}?" in capsys.readouterr().err


def test_as_a_module_without_importing_torch() -> None:
    program = (
        "import sys; sys.argv[1:] = ['--help']; import runpy\n"
        "try: runpy.run_module('rlhf_lightning', run_name='__main__')\n"
        "except SystemExit as exit: print('status', exit.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "status 0 False"
