"""`tinygrad-llm generate`: let a trained model write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from tinygrad_llm.cli.arguments import parse
from tinygrad_llm.cli.errors import UsageError, user_input
from tinygrad_llm.cli.output import Json, Quiet, show_json, show_text

if TYPE_CHECKING:
    from tinygrad_llm.generate import Piece

HELP = """\
Let a trained model write, token by token. The same seed gives the same text.

examples:
  tinygrad-llm generate --model runs/book --prompt "Once upon a time"
  tinygrad-llm generate --model runs/book/checkpoints/step-000500 --temperature 0.7 --top-p 0.9
  tinygrad-llm generate --model runs/book --prompt "One" --num-return-sequences 3 --min-p 0.05
  tinygrad-llm generate --model runs/book --prompt "One" --num-beams 4 --stop-strings . "!"
  tinygrad-llm generate --model runs/book --prompt "One" --quantize int4
  tinygrad-llm generate --model runs/book --prompt "One" --json
"""


@dataclass(frozen=True)
class Options:
    """What to write, and with which model."""

    model: Annotated[str, arg(metavar="DIR")]
    """A run folder (its best checkpoint is taken), or a checkpoint."""
    prompt: str = ""
    """What the text goes on from; empty: it begins a document."""
    max_new_tokens: int = 200
    """The longest text, in tokens; it ends earlier where the model ends the document."""
    temperature: Annotated[
        float | None, arg(metavar="FLOAT", help_behavior_hint="(default: 0.8)")
    ] = None
    """Below 1: safer words; above 1: bolder; 0: always the likeliest."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that share this much probability."""
    min_p: float = 0.0
    """Choose among the tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that were there already become less likely; 1.1 to 1.3 is usual."""
    num_return_sequences: int = 1
    """How many texts; the second is the one that the next seed gives, and so on."""
    stop_strings: Annotated[tuple[str, ...], arg(help_behavior_hint="(default: none)")] = ()
    """A text ends before the first of these."""
    num_beams: int = 1
    """Above 1: search for the likeliest text instead of drawing one, keeping so many at a time."""
    length_penalty: float = 1.0
    """With beams: above 0 favours long texts, below 0 short ones."""
    seed: int = 1
    """Another number, another text."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: the GPU where CuPy sees one."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Hold the weights of the layers in so many bits: less memory, nearly the same text; on a CPU
    it takes longer."""
    quiet: Annotated[Quiet, arg(help="Only the texts, without a line between several.")] = False
    json: Json = False


def run(arguments: Sequence[str]) -> int:
    """Print the prompt and the text after it, as it is written."""
    options = parse(Options, arguments, "generate", HELP)

    from tinygrad_llm.data.tokenizers import Tokenizer
    from tinygrad_llm.generate import GenerationConfig, write_many
    from tinygrad_llm.models.auto import class_of
    from tinygrad_llm.models.pretrained import check_folder, check_vocabulary
    from tinygrad_llm.nn import quantize_
    from tinygrad_llm.train.machine import choose_device
    from tinygrad_llm.train.run import find_checkpoint

    temperature = options.temperature
    if temperature is None:
        temperature = 0.8 if options.num_beams == 1 else 1.0
    with user_input():
        config = GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            temperature=temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            num_beams=options.num_beams,
            length_penalty=options.length_penalty,
            num_return_sequences=options.num_return_sequences,
            stop_strings=options.stop_strings,
        )
        folder = find_checkpoint(options.model)
        device, _ = choose_device(options.device)
        check_folder(folder)
        kind = class_of(folder)
        if not hasattr(kind, "next_logits"):
            raise UsageError(
                f"{folder} holds a {kind.__name__}, which reads texts and writes none: generate "
                "needs a model that goes on from a prompt, such as a gpt, llama, lstm or t5"
            )
        model, tokenizer = kind.from_pretrained(folder).to(device), Tokenizer.from_file(folder)
        check_vocabulary(tokenizer.vocab_size, model.config.vocab_size)
        if options.quantize != "none":
            quantize_(model, bits={"int8": 8, "int4": 4}[options.quantize])
        pieces = write_many(model, tokenizer, options.prompt, config, seed=options.seed)
    try:
        if options.json:
            _show_objects(pieces, options, folder)
        else:
            count, titled = config.num_return_sequences, not options.quiet
            show_text(_one_after_the_other(pieces, options.prompt, count, titled))
    except FloatingPointError as error:
        raise UsageError(str(error)) from error
    return 0


def _show_objects(pieces: Iterator[Piece], options: Options, folder: Path) -> None:
    """An object for each text, as soon as it is whole."""
    texts = [options.prompt] * options.num_return_sequences
    for number, text, last in pieces:
        texts[number] += text
        if last:
            found = {"model": str(folder), "prompt": options.prompt, "text": texts[number]}
            show_json(found | {"number": number + 1, "seed": options.seed})


def _one_after_the_other(
    pieces: Iterator[Piece], prompt: str, count: int, titled: bool = True
) -> Iterator[str]:
    """What to print: the first text as it is written, each other when those before it are whole."""
    waiting: dict[int, list[Piece]] = {number: [] for number in range(count)}
    for number in range(count):
        if count > 1 and titled:
            yield f"--- {number + 1} of {count} ---\n"
        yield prompt
        last = False
        while not last:
            while not waiting[number]:
                piece = next(pieces)
                waiting[piece.number].append(piece)
            _, text, last = waiting[number].pop(0)
            yield text
        yield "\n"
