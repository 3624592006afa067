"""A text larger than memory may be: tokenised, trained and validated on, and the peak memory.

Writes a text of the size asked for (paragraphs of the standard library in random order, some of
them in other scripts, cut into documents), lets `tinygrad-llm pretrain gpt` train on it in a
process of its own with an empty cache, and then once more with the token file that is there now.

    python benchmarks/large_corpus.py [--size 2000] [--tokenizer bpe] [--vocab-size 1024] [--save]

Peak memory is the kernel's own count for the process (ru_maxrss: all that was ever resident at
once, mapped files and shared libraries included).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import environment

from tinygrad_llm.data import END_OF_TEXT, corpora

RESULTS = Path(__file__).parent / "results"
LIMIT_MIB = 500  # what it should stay under

OTHER_SCRIPTS = (
    "Die Größe der Änderung: naïve café — «déjà vu», señor, Łódź, Ελλάδα, Привет.",
    "语言模型从文本中学习：每一个词元都由它前面的词元来预测。",
    "日本語の文章も同じように、バイトの列として扱われる。",
    "🎉 👩‍🔬 emoji, e\u0301 with a combining accent, ∑ᵢ xᵢ² ≤ ‖x‖².",
)


def paragraphs(seed: int) -> Iterator[str]:
    """Paragraphs without end: all of the built-in ones in random order, then again in another."""
    pieces = [
        piece
        for name in corpora.names()
        for document in corpora.load(name).documents
        for piece in document.split("\n\n")
        if piece.strip()
    ]
    order = random.Random(seed)
    while True:
        order.shuffle(pieces)
        for i, piece in enumerate(pieces):
            yield piece
            if i % 40 == 0:
                yield f"{i}. {order.choice(OTHER_SCRIPTS)}"


def generate(path: Path, size: int, seed: int = 1) -> int:
    """Write about `size` bytes of text; how many it came to."""
    lengths = random.Random(seed)
    written, left = 0, 0
    with path.open("wb") as file:
        for paragraph in paragraphs(seed):
            if left == 0:
                written += file.write(END_OF_TEXT.encode() if written else b"")
                left = lengths.randint(1, 60)  # paragraphs of the next document
            written += file.write(f"{paragraph}\n\n".encode())
            left -= 1
            if written >= size:
                break
    return written


def measure(command: list[str], cache: Path) -> dict[str, Any]:
    """Run the command; its peak memory, its seconds, and what it said and when."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TINYGRAD_LLM_CACHE": str(cache)},
    )
    assert process.stdout is not None
    said: list[tuple[float, str]] = []
    for line in process.stdout:
        said.append((time.perf_counter() - start, line.rstrip()))
        print(f"  {said[-1][0]:7.1f} s  {said[-1][1]}", flush=True)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    began = next((t for t, line in said if line.startswith("step ")), None)
    return {
        "peak_mib": usage.ru_maxrss / 1024,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "seconds_to_first_step": began,
    }


def tokenising(cache: Path) -> dict[str, Any]:
    """Seconds from the lock, which is made first, to the index, which is written last; counts."""
    (index,) = (cache / "tokens").glob("*/index.json")
    lock = cache / "tokens" / f".{index.parent.name}.lock"
    found = json.loads(index.read_text(encoding="utf-8"))
    return {
        "seconds": index.stat().st_mtime - lock.stat().st_mtime,
        "tokens": found["tokens"],
        "documents": found["documents"],
        "text_bytes": found["bytes"],
        "file_bytes": sum(file.stat().st_size for file in index.parent.iterdir()),
    }


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Generate, train, train again; all numbers."""
    text, cache = folder / "large.txt", folder / "cache"
    size = generate(text, arguments.size * 10**6)
    print(f"text: {size:,} bytes", flush=True)
    command = [sys.executable, "-m", "tinygrad_llm", "pretrain", "gpt", "--preset", "tiny"]
    command += ["--data", str(text), "--tokenizer", arguments.tokenizer]
    command += ["--vocab-size", str(arguments.vocab_size), "--steps", str(arguments.steps)]
    command += ["--batch-size", "16", "--context", "64", "--no-mfu"]
    command += ["--eval-batches", str(arguments.eval_batches)]
    first = measure([*command, "--run", str(folder / "first")], cache)
    tokens = tokenising(cache)
    again = measure([*command, "--run", str(folder / "again")], cache)
    return {
        "tokenizer": arguments.tokenizer,
        "vocab_size": arguments.vocab_size,
        "steps": arguments.steps,
        "bytes": size,
        "tokenising": tokens,
        "first_run": first,
        "second_run": again,
        "environment": environment(),
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: what was done, how long it took, how much memory the process had at most."""
    tokens, first, again = found["tokenising"], found["first_run"], found["second_run"]
    speed = tokens["text_bytes"] / 1e6 / max(tokens["seconds"], 1e-9)
    about = ", ".join(f"{key} {value}" for key, value in found["environment"].items())
    peak = max(first["peak_mib"], again["peak_mib"])
    verdict = "within" if peak < LIMIT_MIB else "ABOVE"
    rows = [
        ("text", f"{found['bytes'] / 1e6:,.0f} MB, {tokens['documents']:,} documents"),
        ("tokenizer", f"{found['tokenizer']}, vocabulary asked for {found['vocab_size']:,}"),
        ("tokens", f"{tokens['tokens']:,} in {tokens['file_bytes'] / 1e6:,.0f} MB"),
        ("tokenising", f"{tokens['seconds']:,.1f} s, {speed:.1f} MB/s"),
        ("peak memory, first run", f"{first['peak_mib']:.0f} MiB"),
        ("peak memory, token file there", f"{again['peak_mib']:.0f} MiB"),
        ("whole first run", f"{first['seconds']:,.1f} s, {found['steps']} steps"),
        ("whole second run", f"{again['seconds']:,.1f} s"),
    ]
    lines = [
        "# A large text",
        "",
        f"`large_corpus.py --size {found['bytes'] // 10**6}`: {about}",
        "",
        f"Peak memory is {verdict} the {LIMIT_MIB} MiB.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=2000, help="of the text, in MB")
    parser.add_argument("--tokenizer", choices=("byte", "char", "bpe"), default="bpe")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eval-batches", type=int, default=100, help="0: the whole split")
    parser.add_argument("--folder", help="for text, cache and runs; otherwise a temporary one")
    parser.add_argument("--save", action="store_true", help="write into benchmarks/results/")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="large-corpus-", dir=arguments.folder) as folder:
        found = run(arguments, Path(folder))
    text = table(found)
    print(f"\n{text}")
    if arguments.save:
        (RESULTS / "large_corpus.md").write_text(f"{text}\n", encoding="utf-8")
        (RESULTS / "large_corpus.json").write_text(
            json.dumps(found, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
