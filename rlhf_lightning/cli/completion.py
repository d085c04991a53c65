"""``completion``: a script that makes the shell complete commands, options, classes and files."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from rlhf_lightning.cli.arguments import ArgumentParser

_EXAMPLES = """\
  rlhf-lightning completion bash > ~/.local/share/bash-completion/completions/rlhf-lightning
  rlhf-lightning completion zsh > ~/.zsh/completions/_rlhf-lightning    (a folder in $fpath)
  rlhf-lightning completion fish > ~/.config/fish/completions/rlhf-lightning.fish"""


def parser() -> ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(
        "completion",
        "Print a script that completes command lines. Options and class names stand in it as text,"
        "\nso a TAB costs nothing; make it anew after an update.",
        _EXAMPLES,
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def main(command: str, arguments: Sequence[str]) -> int:
    """Entry point of ``completion``."""
    options = parser().parse_args(arguments)
    from rlhf_lightning.cli.option_tables import command_tables
    from rlhf_lightning.cli.quiet import quieten
    from rlhf_lightning.cli.shells import script

    quieten()
    print(script(options.shell, command_tables(), version("rlhf-lightning")), end="")
    return 0
