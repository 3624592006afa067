"""`tinygrad-llm generate`: let a trained model write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from tinygrad_llm.cli.arguments import parse
from tinygrad_llm.cli.errors import user_input
from tinygrad_llm.cli.output import show_text

HELP = """\
Let a trained model write, token by token. The same seed gives the same text.

examples:
  tinygrad-llm generate --model runs/book --prompt "Once upon a time"
  tinygrad-llm generate --model runs/book/checkpoints/step-000500 --temperature 0.7 --top-p 0.9
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
    temperature: float = 0.8
    """Below 1: safer words; above 1: bolder; 0: always the likeliest."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that share this much probability."""
    seed: int = 1
    """Another number, another text."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: the GPU where CuPy sees one."""


def run(arguments: Sequence[str]) -> int:
    """Print the prompt and the text after it, as it is written."""
    options = parse(Options, arguments, "generate", HELP)

    from tinygrad_llm.data.tokenizers import Tokenizer
    from tinygrad_llm.generate import write
    from tinygrad_llm.models.gpt import GPT
    from tinygrad_llm.train.machine import choose_device
    from tinygrad_llm.train.run import find_checkpoint

    with user_input():
        folder = find_checkpoint(options.model)
        device, _ = choose_device(options.device)
        model, tokenizer = GPT.from_pretrained(folder).to(device), Tokenizer.from_file(folder)
        text = write(
            model,
            tokenizer,
            options.prompt,
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        )
    show_text([options.prompt])
    show_text(text)
    print()
    return 0
