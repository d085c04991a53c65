"""Completion scripts for bash, zsh and fish: tables as text, and a small driver for each."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from rlhf_lightning.cli.option_tables import CommandTable, Option

_HEADER = "# Completion of rlhf-lightning {version}, made by: rlhf-lightning completion {shell}"

# Options with dots are completed a part at a time: --data. offers --data.phase, but what lies
# below that only once its dot is typed.
_BASH = """\
_rlhf_lightning_add() {
  # compgen -W would expand the words as if they were typed
  local word
  while IFS= read -r word; do
    [[ $word == "$1"* ]] && COMPREPLY+=("$word")
  done
}
_rlhf_lightning() {
  local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}
  local command=${COMP_WORDS[1]} words flag rest
  # bash cuts words at =, so the option before `=value` is two words back
  if [[ $current == = ]]; then
    current=
  elif [[ $previous == = ]]; then
    previous=${COMP_WORDS[COMP_CWORD-2]}
  fi
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    _rlhf_lightning_add "$current" < <(_rlhf_lightning_commands)
  elif [[ $current == -* ]]; then
    while IFS= read -r flag; do
      [[ $flag == "$current"* ]] || continue
      rest=${flag#"$current"}
      [[ $rest == *.* ]] && flag=$current${rest%%.*}.
      [[ " ${COMPREPLY[*]} " == *" $flag "* ]] || COMPREPLY+=("$flag")
    done < <(_rlhf_lightning_options "$command")
    [[ ${#COMPREPLY[@]} == 1 && $COMPREPLY == *. ]] && compopt -o nospace 2>/dev/null
  else
    words=$(_rlhf_lightning_values "$command" "$previous")
    [[ -z $words && $previous != --* ]] && words=$(_rlhf_lightning_values "$command" "")
    if [[ $words == *@files ]]; then
      compopt -o filenames 2>/dev/null
      words=${words%@files}$(compgen -f -- "$current")
    fi
    [[ -n $words ]] && _rlhf_lightning_add "$current" <<< "$words"
  fi
}
complete -F _rlhf_lightning rlhf-lightning"""

_ZSH = """\
_rlhf_lightning() {
  local current=${words[CURRENT]} previous=${words[CURRENT-1]} command=${words[2]}
  local found flag rest
  if (( CURRENT == 2 )); then
    compadd -- ${(f)"$(_rlhf_lightning_commands)"}
    return
  fi
  if [[ $current == --*=* ]]; then
    previous=${current%%=*}
    compset -P '*='
  elif [[ $current == -* ]]; then
    local -aU complete partial
    for flag in ${(f)"$(_rlhf_lightning_options $command)"}; do
      [[ $flag == "$current"* ]] || continue
      rest=${flag#"$current"}
      if [[ $rest == *.* ]]; then partial+=("$current${rest%%.*}."); else complete+=("$flag"); fi
    done
    (( $#complete )) && compadd -- $complete
    (( $#partial )) && compadd -S '' -- $partial
    return
  fi
  found=$(_rlhf_lightning_values $command $previous)
  [[ -z $found && $previous != --* ]] && found=$(_rlhf_lightning_values $command "")
  [[ $found == *@files ]] && _files
  found=${found%@files}
  [[ -n $found ]] && compadd -- ${(f)found}
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
  _rlhf_lightning "$@"
else
  compdef _rlhf_lightning rlhf-lightning
fi"""


def script(shell: str, tables: Sequence[CommandTable], version: str) -> str:
    """The completion script of a shell.

    Args:
        shell: ``bash``, ``zsh`` or ``fish``.
        tables: of all commands.
        version: of this package.
    """
    header = _HEADER.format(version=version, shell=shell)
    if shell == "fish":
        return "\n".join([header, *_fish(tables), ""])
    first = ["#compdef rlhf-lightning"] if shell == "zsh" else []
    driver = _ZSH if shell == "zsh" else _BASH
    return "\n".join([*first, header, *_functions(tables), driver, ""])


def _functions(tables: Sequence[CommandTable]) -> list[str]:
    """Functions that print words, one a line, in what bash and zsh have in common."""
    commands = _echo([*(table.name for table in tables), "--help", "--version"])
    lines = [f"_rlhf_lightning_commands() {{ {commands}; }}", "_rlhf_lightning_options() {"]
    lines.append('  case "$1" in')
    for names, flags in _merged((table.name, _flags(table)) for table in tables):
        lines.append(f"  {'|'.join(names)}) {_echo(flags)};;")
    lines += ["  esac", "}", "_rlhf_lightning_values() {", '  case "$1 $2" in']
    entries = [
        (f"{table.name} {option.flag}", ("@files",) if option.files else option.values)
        for table in tables
        for option in table.options
    ]
    entries += [
        (f"{table.name} ", (*table.words, *(["@files"] if table.files else []))) for table in tables
    ]
    for keys, words in _merged(entry for entry in entries if entry[1]):
        lines.append(f"  {'|'.join(shlex.quote(key) for key in keys)}) {_echo(words)};;")
    return [*lines, "  esac", "}"]


def _flags(table: CommandTable) -> tuple[str, ...]:
    return (*(option.flag for option in table.options), "--help")


def _echo(words: Iterable[str]) -> str:
    return "printf '%s\\n' " + " ".join(shlex.quote(word) for word in words)


def _merged(
    entries: Iterable[tuple[str, tuple[str, ...]]],
) -> Iterable[tuple[list[str], tuple[str, ...]]]:
    """Keys with the same words together, so that the script stays small."""
    by_words: dict[tuple[str, ...], list[str]] = {}
    for key, words in entries:
        by_words.setdefault(words, []).append(key)
    return ((keys, words) for words, keys in by_words.items())


def _fish(tables: Sequence[CommandTable]) -> list[str]:
    """One ``complete`` for each command and each option."""
    first = "complete -c rlhf-lightning -f -n __fish_use_subcommand"
    lines = [f"{first} -a {_fish_word(t.name)} -d {_fish_word(t.summary)}" for t in tables]
    for table in tables:
        here = f"complete -c rlhf-lightning -n '__fish_seen_subcommand_from {table.name}'"
        arguments = "-F" if table.files else "-f"
        words = f" -a {_fish_list(table.words)}" if table.words else ""
        lines.append(f"{here} {arguments}{words}")
        lines += [f"{here} {_fish_option(option)}" for option in table.options]
    return lines


def _fish_option(option: Option) -> str:
    kind = "-r -F" if option.files else "-x"
    words = f" -a {_fish_list(option.values)}" if option.values else ""
    return f"-l {_fish_word(option.flag.removeprefix('--'))} {kind}{words}"


def _fish_list(words: Iterable[str]) -> str:
    """Words for ``-a``, which fish expands once more."""
    return _fish_word(" ".join(_fish_word(word) for word in words))


def _fish_word(text: str) -> str:
    """Text in single quotes, as fish reads them."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
