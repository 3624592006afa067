"""Lesson 10: translate, with the transformer of "Attention Is All You Need".

What you will learn:
- an encoder reads the whole source, a decoder writes the target, one token after the other;
- greedy and beam search: the likeliest token each time, or the likeliest text;
- to compare with what costs nothing: copying the source, and a dictionary;
- where the decoder looks while it writes, printed as text.

The pairs are built in: names of Python's library run together, 'getdefaultencoding', into words,
'get default encoding'. With the word `small` behind it, the lesson trains for seconds only.
"""

import math
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from tinygrad_llm import manual_seed, no_grad, ops, optim
from tinygrad_llm.data import builtin
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.generate import GenerationConfig, beam_search, source_ids
from tinygrad_llm.models.encoder_decoder import shift_right
from tinygrad_llm.models.seq2seq import Seq2Seq, Seq2SeqConfig
from tinygrad_llm.optim.schedules import Cosine, Warmup
from tinygrad_llm.tasks.translation import TranslationTask, translate

LONGEST = 60  # characters that it may write


def make_model(tokenizer: Tokenizer) -> Seq2Seq:
    """The paper's network at a hundredth of its size: two layers on each side."""
    sizes = ("layers", 2), ("attention_heads", 4), ("ffn_dim", 128)
    options: dict[str, Any] = {f"{side}coder_{k}": n for side in ("en", "de") for k, n in sizes}
    options |= {"decoder_start_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    return Seq2Seq(Seq2SeqConfig(tokenizer.vocab_size, d_model=64, norm_first=True, **options))


def train(model: Seq2Seq, task: TranslationTask, steps: int) -> None:
    optimizer = optim.Adam(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
    scheduler = optim.LRScheduler(optimizer, Warmup(steps // 10, Cosine(steps - steps // 10)))
    for step in range(1, steps + 1):
        # Every token of a target is asked for at once, each after the right ones before it.
        loss = task.loss(model, task.next_batch())
        optimizer.zero_grad()
        loss.backward()
        optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % (steps // 4) == 0:
            print(f"   step {step}: loss {loss.item():.3f} a character")


def longest_words_first(source: str, known: set[str]) -> str:
    """Cut off the longest word that training has, again and again: a dictionary, no network."""
    words = []
    while source:
        end = next((n for n in range(len(source), 0, -1) if source[:n] in known), 1)
        words.append(source[:end])
        source = source[end:]
    return " ".join(words)


def bleu(found: list[str], right: list[str]) -> float:
    """100 · brevity · √(p₁ p₂), pₙ: the share of n-grams that are right; 4-grams names have not."""
    matched, total = np.zeros(2), np.zeros(2)
    for ours, theirs in zip(found, right, strict=True):
        for n in (0, 1):
            a, b = (Counter(zip(w, w[n:], strict=False)) for w in (ours.split(), theirs.split()))
            matched[n] += (a & b).total()
            total[n] += a.total()
    words = [sum(len(text.split()) for text in texts) for texts in (found, right)]
    brevity = min(1.0, math.exp(1 - words[1] / max(1, words[0])))
    return 100 * brevity * math.sqrt(np.prod(matched / np.maximum(total, 1)))


def cross_attention(model: Seq2Seq, source: list[int], target: list[int]) -> np.ndarray:
    """softmax(Q Kᵀ / √D) of the decoder's last layer, the mean of its heads: (T, S)"""
    last: Any = model.decoder.layers[-1]
    attention, seen = last.cross_attn, {}
    projections = {"q": attention.q_proj, "k": attention.k_proj}  # of the decoder, of the encoder
    hooks = [
        p.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output}))
        for name, p in projections.items()
    ]
    with no_grad():
        model([source], shift_right([target], model.config.decoder_start_token_id, 0))
    for hook in hooks:
        hook.remove()
    q, k = (seen[x][0].reshape(-1, attention.num_heads, attention.head_dim) for x in "qk")
    scores = q.swapaxes(0, 1) @ k.swapaxes(0, 1).swapaxes(1, 2)  # (heads, T, S)
    return ops.softmax(scores / math.sqrt(attention.head_dim), axis=-1).numpy().mean(axis=0)


def show(weights: np.ndarray, source: str, target: str) -> None:
    """A row for each character written: the darker, the more it looked at that of the source."""
    print(f"       {source}$")
    for letter, row in zip(target + "$", weights, strict=True):
        shades = "".join(" .:*#"[min(4, int(5 * p / weights.max()))] for p in row)
        print(f"     {letter if letter != ' ' else '_'} {shades}")


def main() -> None:
    steps, count = (40, 20) if sys.argv[1:] == ["small"] else (700, 300)
    splits: Any = builtin.load("translate")
    pairs = [(row[0], row[1]) for row in splits.train.rows]
    held_out = [(row[0], row[1]) for row in splits.validation.rows][:count]
    tokenizer = Tokenizer.char("abcdefghijklmnopqrstuvwxyz ")
    manual_seed(0)
    model = make_model(tokenizer)
    print(f"1. {len(pairs)} pairs, as {pairs[3]}; {model.config.num_parameters():,} parameters")
    train(model, TranslationTask(pairs, held_out, tokenizer, batch_size=64), steps)

    model.eval()
    sources, right = [list(side) for side in zip(*held_out, strict=True)]
    known = {word for _, target in pairs for word in target.split()}
    beams = GenerationConfig(LONGEST, num_beams=4)
    greedy = GenerationConfig(LONGEST, temperature=0.0)
    print(f"\n2. {count} names of modules never seen: BLEU-2, and how many are right to the letter")
    found = {
        "the source, copied": sources,
        "a dictionary": [longest_words_first(source, known) for source in sources],
        "greedy": translate(model, tokenizer, sources, greedy),
        "4 beams": translate(model, tokenizer, sources, beams),
    }
    exact = {}
    for name, texts in found.items():
        exact[name] = float(np.mean([a == b for a, b in zip(texts, right, strict=True)]))
        print(f"   {name:20} {bleu(texts, right):5.1f} {exact[name]:6.1%}")
    # The network has learned words from letters alone. A dictionary, which is told where words
    # are in training, is hard to beat for it; copying is not. Unless `small`, of course.
    assert steps < 100 or exact["4 beams"] > exact["greedy"] - 0.05 > 0.25

    i = next((i for i in range(count) if found["greedy"][i] != found["4 beams"][i]), 0)
    print(f"\n3. Greedy wrote {found['greedy'][i]!r}; what beam search weighed:")
    beams = replace(beams, num_return_sequences=4)
    for ids, score in beam_search(model, source_ids(model, tokenizer, sources[i]), beams):
        print(f"   {score:6.2f}  {tokenizer.decode(ids[:-1])}")
    print("\n4. Where it looks while it writes (_ is a blank, $ the end):")
    source, target = "setloglevel", "set log level"
    ids = [source_ids(model, tokenizer, text) for text in (source, target)]
    show(weights := cross_attention(model, *ids), source, target)
    looked_at = weights.argmax(axis=1)  # it moves on through the source
    assert steps < 100 or np.corrcoef(looked_at, range(len(ids[1])))[0, 1] > 0.8


if __name__ == "__main__":
    main()
