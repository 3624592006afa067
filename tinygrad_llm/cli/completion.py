"""`tinygrad-llm completion bash|zsh|fish`: what makes a shell complete commands and flags.

The scripts are written from the dataclasses that the commands parse, so they cannot fall behind
them. (tyro's own knows one dataclass at a time, and not fish.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import Fixed, FlagCreatePairsOff, Positional, Suppress, arg

from tinygrad_llm.cli.arguments import parse
from tinygrad_llm.cli.errors import UsageError
from tinygrad_llm.data import corpora, download
from tinygrad_llm.finetune.config import TASKS
from tinygrad_llm.kernels.compile import kernels
from tinygrad_llm.train.config import ARCHITECTURES, TOKENIZERS

HELP = """\
Print a script that makes the shell complete commands, flags and their values on the Tab key.

To have it in every new shell:
  bash   echo 'source <(tinygrad-llm completion bash)' >> ~/.bashrc
  zsh    echo 'source <(tinygrad-llm completion zsh)' >> ~/.zshrc       (below `compinit`)
  fish   tinygrad-llm completion fish > ~/.config/fish/completions/tinygrad-llm.fish

examples:
  tinygrad-llm completion bash
  tinygrad-llm completion zsh
  tinygrad-llm completion fish
"""

# The words of a command -> the module and the dataclass that it parses, or a table of them by the
# last word.
FORMS = {
    **{f"pretrain {kind}": ("pretrain", "OPTIONS") for kind in ARCHITECTURES},
    **{f"finetune {task}": ("finetune", "Options") for task in TASKS},
    "predict": ("predict", "Options"),
    "generate": ("generate", "Options"),
    "evaluate": ("evaluate", "Options"),
    "runs": ("runs", "Options"),
    "runs compare": ("runs", "CompareOptions"),
    "tokenizer train": ("tokenizer", "TrainOptions"),
    "tokenizer show": ("tokenizer", "ShowOptions"),
    "gradcheck": ("gradcheck", "Options"),
    "xray": ("xray", "Options"),
    "doctor": ("doctor", "Options"),
    "completion": ("completion", "Options"),
}


@dataclass(frozen=True)
class Options:
    """Which shell."""

    shell: Annotated[
        Positional[Literal["bash", "zsh", "fish"]], arg(metavar="bash|zsh|fish", help="The shell.")
    ]


def run(arguments: Sequence[str]) -> int:
    """Print the script."""
    if not arguments:
        raise UsageError("completion for which shell? Expected bash, zsh or fish, got nothing")
    options = parse(Options, arguments, "completion", HELP)
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[options.shell](commands()), end="")
    return 0


# --- what there is to complete --------------------------------------------------------------------


@dataclass(frozen=True)
class Flag:
    """One flag: the words that may follow it, and whether a path may; a switch takes nothing."""

    name: str
    choices: tuple[str, ...] = ()
    takes_path: bool = False
    is_switch: bool = False


@dataclass(frozen=True)
class Command:
    """One place in a command line: the words up to it, and what may come next."""

    words: str  # "" for the program alone, "runs compare"
    inner: tuple[str, ...]  # sub-commands, or the values of a positional argument
    flags: tuple[Flag, ...]
    takes_path: bool = False


def commands() -> list[Command]:
    """Every place in a command line where something can be completed."""
    from tinygrad_llm.cli import COMMANDS

    switches = (Flag("--help", is_switch=True), Flag("--version", is_switch=True))
    top = Command("", tuple(COMMANDS), switches)
    found = [top]
    for word in COMMANDS:
        inner = tuple(words.split()[1] for words in FORMS if words.startswith(f"{word} "))
        found.append(_command(word, inner))
        found += [_command(f"{word} {second}", ()) for second in inner]
    return found


def _command(words: str, inner: tuple[str, ...]) -> Command:
    flags, takes_path = [Flag("--help", is_switch=True)], False
    if words in FORMS:
        module, name = FORMS[words]
        kind = getattr(import_module(f"tinygrad_llm.cli.{module}"), name)
        for flag in _flags(kind[words.split()[-1]] if isinstance(kind, dict) else kind):
            if flag.name.startswith("--"):
                flags.append(flag)
            else:  # a positional argument
                inner, takes_path = inner + flag.choices, flag.takes_path
    return Command(words, inner, tuple(flags), takes_path)


def _flags(kind: type) -> Iterator[Flag]:
    """The flags of a dataclass and of those inside it; a positional argument has no dashes."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint, notes = _without_notes(hints[field.name])
        if any(note is _FIXED or note is _SUPPRESSED for note in notes):
            continue
        if is_dataclass(hint):
            yield from _flags(hint)  # pyright: ignore[reportArgumentType]
            continue
        name = next((note.name for note in notes if getattr(note, "name", None)), field.name)
        metavar = next((note.metavar for note in notes if getattr(note, "metavar", None)), "") or ""
        name = name.replace("_", "-")
        if hint is bool:
            yield Flag(f"--{name}", is_switch=True)
            if not any(note is FlagCreatePairsOff for note in notes):
                yield Flag(f"--no-{name}", is_switch=True)
        else:
            dashes = "" if any(note is _POSITIONAL for note in notes) else "--"
            takes_path = any(word in metavar for word in _PATHS)
            choices = next((w for k, w in _NAMED.items() if k in metavar), _choices(hint, metavar))
            yield Flag(f"{dashes}{name}", choices, takes_path)


# What a word in a metavar stands for.
_NAMED = {
    "NAME": (*corpora.names(), *download.PUBLIC),
    "KIND": TOKENIZERS,
    "KERNEL": tuple(kernels()),
}
_POSITIONAL = get_args(Positional[str])[1]
_FIXED, _SUPPRESSED = get_args(Fixed[str])[1], get_args(Suppress[str])[1]
_PATHS = ("DIR", "FILE", "FOLDER", "PATH", "RUN", "SOURCE")  # in a metavar: it names a path


def _without_notes(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Annotated[T, a, b] -> T, (a, b)"""
    if get_origin(hint) is Annotated:
        kind, *notes = get_args(hint)
        return kind, tuple(notes)
    return hint, ()


def _choices(hint: Any, metavar: str) -> tuple[str, ...]:
    """Those of a Literal, or of a metavar such as {demo,tiny}."""
    if get_origin(hint) is Literal:
        return tuple(map(str, get_args(hint)))
    braces = metavar.startswith("{") and metavar.endswith("}")
    return tuple(metavar[1:-1].split(",")) if braces else ()


# --- the scripts ----------------------------------------------------------------------------------


def _bash(tree: Sequence[Command]) -> str:
    """`complete -F`: the words up to the cursor in COMP_WORDS, what fits into COMPREPLY.

    Also for macOS' bash 3.2, which has neither mapfile nor compopt. Bash splits `--preset=tiny` at
    the '='.
    """
    return f"""\
# bash completion for tinygrad-llm; `tinygrad-llm completion --help` says how to install it.
_tinygrad_llm() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}}
    if [[ $word == "=" ]]; then
        word=
    elif [[ $before == "=" ]]; then
        before=${{COMP_WORDS[COMP_CWORD - 2]}}
    fi
    local place= i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$place ${{COMP_WORDS[i]}}" in
            {_places(tree)}) place="$place ${{COMP_WORDS[i]}}" ;;
            *) break ;;
        esac
    done
    local words= path=
    case "$place $before" in
{_after_flags(tree)}
        *)
            case "$place" in
{_at_places(tree)}
            esac
            ;;
    esac
    local IFS=$' \\t\\n'
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    if [[ -n $path && $word != -* ]]; then
        IFS=$'\\n'
        COMPREPLY+=($(compgen -f -- "$word"))
        compopt -o filenames 2>/dev/null
    fi
}}
complete -F _tinygrad_llm tinygrad-llm
"""


def _zsh(tree: Sequence[Command]) -> str:
    """`compdef`: the words in $words, the one at the cursor is the CURRENT-th (from 1)."""
    return f"""\
# zsh completion for tinygrad-llm; `tinygrad-llm completion --help` says how to install it.
_tinygrad_llm() {{
    local before=${{words[CURRENT-1]}} place= i
    if compset -P '--*='; then
        before=${{IPREFIX%=}}
    fi
    for ((i = 2; i < CURRENT; i++)); do
        case "$place ${{words[i]}}" in
            {_places(tree)}) place="$place ${{words[i]}}" ;;
            *) break ;;
        esac
    done
    local words_= path_=
    case "$place $before" in
{_after_flags(tree, "_")}
        *)
            case "$place" in
{_at_places(tree, "_")}
            esac
            ;;
    esac
    [[ -n $words_ ]] && compadd -- ${{=words_}}
    [[ -n $path_ ]] && _files
}}
compdef _tinygrad_llm tinygrad-llm
"""


def _places(tree: Sequence[Command]) -> str:
    """The patterns of a shell's `case` for the words that lead further: " runs"|" runs compare" """
    return "|".join(f'" {command.words}"' for command in tree if command.words)


def _after_flags(tree: Sequence[Command], suffix: str = "") -> str:
    """What may follow each flag that takes a value, as branches of a `case`."""
    lines = []
    for command in tree:
        place = f" {command.words}" if command.words else ""
        for flag in command.flags:
            if not flag.is_switch:
                path = f" path{suffix}=yes" if flag.takes_path else ""
                words = f' words{suffix}="{" ".join(flag.choices)}"' if flag.choices else ""
                lines.append(f'        "{place} {flag.name}"){words + path or " :"} ;;')
    return "\n".join(lines)


def _at_places(tree: Sequence[Command], suffix: str = "") -> str:
    """What may follow each command, as branches of a `case`."""
    lines = []
    for command in tree:
        place = f" {command.words}" if command.words else ""
        words = " ".join([*command.inner, *(flag.name for flag in command.flags)])
        path = f" path{suffix}=yes" if command.takes_path else ""
        lines.append(f'                "{place}") words{suffix}="{words}"{path} ;;')
    return "\n".join(lines)


def _fish(tree: Sequence[Command]) -> str:
    """`complete -c`: a line for each thing that may come next, with the condition under which."""
    lines = [_FISH_HEAD, *(line for command in tree for line in _fish_command(command))]
    return "\n".join(lines) + "\n"


_FISH_HEAD = """\
# fish completion for tinygrad-llm; `tinygrad-llm completion --help` says how to install it.
function __tinygrad_llm_at --description 'the words before the cursor begin with these'
    set -l words (commandline -opc)[2..-1]
    test (count $words) -ge (count $argv)
    and test "$words[1..$(count $argv)]" = "$argv"
end
function __tinygrad_llm_after --description 'there are as many words before the cursor'
    test (count (commandline -opc)) -eq (math 1 + $argv[1])
end
complete -c tinygrad-llm -f"""


def _fish_command(command: Command) -> Iterator[str]:
    words = command.words.split()
    next_word = f"__tinygrad_llm_after {len(words)}"
    at = f"__tinygrad_llm_at {command.words}" if words else next_word
    if command.inner:
        first = f"{at}; and {next_word}" if words else at
        yield f"complete -c tinygrad-llm -n '{first}' -a '{' '.join(command.inner)}'"
    nested = [words for words in FORMS if command.words and words.startswith(f"{command.words} ")]
    if command.flags and nested:  # `runs compare` has its own
        at = "; and not ".join([at, *(f"__tinygrad_llm_at {inner}" for inner in nested)])
    if command.takes_path:
        yield f"complete -c tinygrad-llm -n '{at}' -F"
    for flag in command.flags:
        line = f"complete -c tinygrad-llm -n '{at}' -l {flag.name.removeprefix('--')}"
        if not flag.is_switch:
            line += " -r -F" if flag.takes_path else " -x"
        if flag.choices:
            line += f" -a '{' '.join(flag.choices)}'"
        yield line
