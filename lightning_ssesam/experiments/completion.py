"""Scripts by which a shell completes commands, options and values.

Libraries complete one parser, or start the program at every key, which takes seconds here. The commands have parsers of
their own, so the words are collected from their help once and written into the script.
"""

import re
from collections.abc import Mapping, Sequence

from lightning_ssesam.experiments.class_names import known_classes

SHELLS = ("bash", "zsh", "fish")

Options = Mapping[str, Sequence[str]]
"""By option, the values that it may have; none if they are numbers, texts or files."""

_ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"
_BASH = """_lightning_ssesam() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" option="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    # Bash takes the sign in `--option=value` for a word of its own.
    if [[ "$word" == "=" ]]; then
        word=""
    elif [[ "$option" == "=" ]]; then
        option="${{COMP_WORDS[COMP_CWORD-2]}}"
    fi
    if [[ $COMP_CWORD == 1 ]]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}} $option" in
{values}
            *" --"*) [[ "$word" == -* ]] && words="-" ;;
            "curvature "*) [[ -n "$word" ]] && words="-" ;;
            *) words="-" ;;
        esac
        if [[ "$words" == "-" ]]; then
            case "${{COMP_WORDS[1]}}" in
{options}
            esac
        fi
    fi
    # The names of methods stand with commas between them.
    local before=""
    if [[ "$option" == "--methods" && "$word" == *,* ]]; then
        before="${{word%,*}},"
    fi
    COMPREPLY=($(compgen -P "$before" -W "$words" -- "${{word#"$before"}}"))
}}
complete -o default -F _lightning_ssesam lightning-ssesam
"""


def options_in(text: str) -> dict[str, tuple[str, ...]]:
    """Return the options that the help of a command lists, and the values that each one may have, if they are few."""
    found = re.findall(r"^  (?:-\w[ \w]*, )?(--[\w.]+)(?: \{([^}]*)\})?", text, re.MULTILINE)
    return {name: tuple(choices.split(",")) if choices else known_classes(name[2:]) for name, choices in found}


def completion_script(shell: str, commands: Mapping[str, Options]) -> str:
    """Return the script for a shell.

    Args:
        shell: One of ``"bash"``, ``"zsh"`` and ``"fish"``.
        commands: Options of each command.
    """
    if shell == "fish":
        return _fish(commands)
    values, options = [], []
    for command, names in commands.items():
        values += [
            f'            "{command} {option}") words="{" ".join(choices)}" ;;'
            for option, choices in names.items()
            if choices
        ]
        options.append(f'                {command}) words="{" ".join(names)}" ;;')
    texts = {"values": "\n".join(values), "options": "\n".join(options)}
    script = _BASH.format(commands=" ".join(commands), **texts)
    return _ZSH + script if shell == "zsh" else script


def _fish(commands: Mapping[str, Options]) -> str:
    start = "complete -c lightning-ssesam -n"
    lines = [f'{start} __fish_use_subcommand -f -a "{" ".join(commands)}"']
    for command, names in commands.items():
        seen = f'{start} "__fish_seen_subcommand_from {command}"'
        for option, choices in names.items():
            if option.startswith("--"):
                # Files are values of `--config`, too.
                files = "-r" if option == "--config" else "-x"
                lines.append(f"{seen} -l {option[2:]}" + (f' {files} -a "{" ".join(choices)}"' if choices else ""))
            else:
                lines.append(f'{seen} -f -a "{option}"')
    return "\n".join(lines) + "\n"
