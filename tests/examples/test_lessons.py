"""The lessons run as a reader runs them, keep their promises, and say what they are meant to."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LESSONS = sorted(EXAMPLES.glob("[0-9][0-9]_*.py"))
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run(lesson: Path | str, folder: Path, *arguments: str, **environment: str) -> str:
    """What the lesson prints; every warning is an error, and so is an assert of its own."""
    # One BLAS thread: small products gain nothing from two, and lose much when a core is busy.
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = {"PYTHONUTF8": "1", "TINYGRAD_LLM_KERNELS": "interpret", **environment}
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / lesson, *arguments],
        cwd=folder,  # a lesson works from any folder, and leaves nothing there
        env={**os.environ, **threads, **environment},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert list(folder.iterdir()) == []
    return done.stdout


def parts(output: str) -> list[str]:
    """The numbered parts of what a lesson printed."""
    return re.split(r"^(?=\d\. )", output, flags=re.MULTILINE)[1:]


def number(pattern: str, text: str) -> float:
    """The number that the pattern's only group finds."""
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern!r} in:\n{text}"
    return float(found[1])


def test_01_gradients_by_hand_and_by_tensor_are_equal_and_the_loss_falls(tmp_path: Path) -> None:
    output = run("01_backprop_by_hand.py", tmp_path)
    check, tensors, training, picture = parts(output)[0:4]
    assert len(re.findall(r"∂L/∂\w\d\[.*derived [+-]0\.\d+  nudged [+-]0\.\d+", check)) == 4
    differences = re.findall(r"largest difference of the two gradients (\S+)", tensors)
    assert len(differences) == 4
    assert max(map(float, differences)) < 1e-14
    assert number(r"step   0: loss (\S+);", training) > 0.9
    assert number(r"step 500: loss (\S+);", training) < 0.05
    assert number(r"(\S+)% right", picture) > 95
    rows = [line.strip() for line in picture.splitlines()[1:]]
    assert len(rows) == 19
    assert {len(row) for row in rows} == {57}
    assert set("".join(rows)) == set(".-:abc")


def test_02_the_walk_the_refusals_and_the_memory(tmp_path: Path) -> None:
    walk, second, memory, op, checkpoint = parts(run("02_the_graph_and_its_walk.py", tmp_path))
    assert "2 Multiply  made from  3 Tanh and 3 Tanh" in walk
    assert "4 Multiply  made from  x and w" in walk
    assert number(r"x: ours \[(\S+) ", walk) == pytest.approx(1.363431, abs=1e-5)
    assert number(r"x: .* backward\(\)'s Tensor\(\[(\S+) ", walk) == pytest.approx(1.363431)
    assert "derivative 4 of x⁴ at 2: 24.0; its node: None" in second
    assert "backward through Tanh a second time" in memory
    assert "backward of Exp needs an array of shape (3,)" in memory
    assert number(r"Softsign: worst relative error (\S+)", op) < 1e-6
    assert "GradcheckError: Forgetful, first order: argument 0 of shape (2, 2), index" in op
    sizes = re.findall(r"(\d+) KiB saved on the way there, (\d) call", checkpoint)
    assert [calls for _, calls in sizes] == ["1", "2"]
    assert int(sizes[1][0]) < int(sizes[0][0]) / 10


def test_03_every_form_of_attention_agrees(tmp_path: Path) -> None:
    forms, gradients, picture, root = parts(run("03_attention_from_scratch.py", tmp_path))
    assert forms.count("largest difference") == 5
    assert gradients.count("largest difference") == 3
    assert "   c |        @            |" in picture
    assert "   a |-     -   -          |" in picture
    assert number(r"D 1024  raw   variance +(\S+)", root) > 800
    assert number(r"D 1024  raw .*Σ p \(1 − p\) (\S+)", root) < 0.1
    assert number(r"D 1024  / √D .*Σ p \(1 − p\) (\S+)", root) > 0.9


def test_04_the_gpt_beats_every_baseline_and_writes_words(tmp_path: Path) -> None:
    _, training, losses, samples = parts(run("04_train_a_character_gpt.py", tmp_path))
    assert re.findall(r"step (\d+):", training) == ["80", "160", "240", "320", "400"]
    table = re.findall(r"^   (\w.*?)  +(\d\.\d\d) ", losses, flags=re.MULTILINE)
    assert [name for name, _ in table] == [
        "all characters alike",
        "by their frequency",
        "by the character before",
        "GPT, untrained",
        "GPT, trained",
    ]
    uniform, unigram, bigram, untrained, trained = (float(loss) for _, loss in table)
    assert untrained > unigram
    assert uniform > unigram > bigram > trained
    after = number(r"after training, (\d+)%", samples)
    assert after > number(r"before training, (\d+)%", samples) + 20


@needs_triton
def test_05_every_softmax_moves_the_bytes_that_are_claimed(tmp_path: Path) -> None:
    rungs, online, gpu = parts(run("05_a_softmax_kernel.py", tmp_path))
    table = re.findall(r"^   (\D+?) +(\d+) bytes = (\S+) \|x\|; error (\S+)", rungs, re.MULTILINE)
    assert [(name, walks) for name, _, walks, _ in table] == [
        ("naive", "6.00"),
        ("fused", "2.00"),
        ("online", "3.00"),
        ("the library's", "2.00"),
    ]
    assert [int(moved) for _, moved, _, _ in table] == [192128, 64000, 96000, 64000]
    assert max(float(error) for *_, error in table) < 1e-6
    shrinks = [float(x) for x in re.findall(r"times (\S+);", online)]
    assert shrinks[0] == 0.0  # there was nothing before
    assert shrinks[1] == 1.0  # a block without a new maximum
    assert 0 < min(shrinks[2:]) < max(shrinks[2:]) < 1
    assert number(r"fused +A100 +\d+ µs  H100 +(\d+) µs", gpu) == 160


@needs_triton
def test_06_the_counted_reads_and_the_x_ray_of_every_rung(tmp_path: Path) -> None:
    tiles, order, rungs = parts(run("06_a_matmul_kernel.py", tmp_path))
    assert "one element a program 128 KiB, a tile of 16 × 16 8 KiB" in tiles
    assert re.findall(r"GROUP (\d): (\d+) KiB", order) == [("1", "90"), ("3", "54")]
    found = re.findall(r"^   (\d) \D+\d+ registers, +(\d+) KiB .*, (.*)\n", rungs, re.MULTILINE)
    assert [rung for rung, _, _ in found] == list("12345")
    assert [units for *_, units in found] == ["no tensor cores"] * 4 + ["wgmma"]
    shared = [int(size) for _, size, _ in found]
    assert shared[0] < shared[1] == shared[2] < shared[3] < shared[4]
    assert re.findall(r"(\S+) FLOPs a byte: ", rungs) == ["0.25", "16", "16", "16", "64"]


@needs_triton
def test_07_flash_attention_moves_and_multiplies_less(tmp_path: Path) -> None:
    counted, roofline, memory = parts(run("07_flash_attention.py", tmp_path))
    assert re.findall(r"(\w+(?: causal)?) +(\d+) KiB  (\S+) MFLOP", counted) == [
        ("naive", "1152", "8.4"),
        ("flash", "320", "8.4"),
        ("naive causal", "1152", "8.4"),
        ("flash causal", "224", "5.2"),
    ]
    limits = re.findall(r"(.100): at least (\S+) ms, for (\w+)", roofline)
    assert [what for *_, what in limits] == ["memory", "memory", "multiplying", "multiplying"]
    assert float(limits[3][1]) < float(limits[1][1]) / 4
    assert number(r"T 65536: +(\S+) GiB", memory) == 256


def test_08_the_repaired_tagger_learns_and_its_table_hides_nothing(tmp_path: Path) -> None:
    broken, training, found = parts(run("08_a_tagger_as_found_on_the_web.py", tmp_path))
    assert "As found, it stops: " in broken
    assert "(2, 24) words give scores (2, 24, " in broken
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss (\S+)", training)]
    assert losses == sorted(losses, reverse=True)
    rows = re.findall(r"^   (\S+) +\d\.\d\d +\d\.\d\d +(\d\.\d\d) +(\d+)$", found, re.MULTILINE)
    assert {"O", "B-PARAMETER", "I-CALL"} <= {tag for tag, _, _ in rows}
    macro = sum(float(f1) for _, f1, _ in rows) / len(rows)  # of the rows that are printed
    assert number(r"(\S+)  macro, with O\n", found) == pytest.approx(macro, abs=0.01)
    with_o = number(r"(\S+)  micro, with O\n", found)
    assert with_o > number(r"(\S+)  micro, without O\n", found)
    assert number(r"(\S+)  whole entities\n", found) > 0.5
    assert with_o > number(r"(\S+)  micro, with O, of a model that says O to all\n", found)


def test_09_a_crf_breaks_no_rule_and_sums_over_all_sequences(tmp_path: Path) -> None:
    sums, heads, broken, moves = parts(run("09_names_with_a_crf.py", tmp_path, "small"))
    by_hand = number(r"one by one: (\S+)", sums)
    assert number(r"forward algorithm: (\S+);", sums) == pytest.approx(by_hand, abs=1e-4)
    assert number(r"nn.CRF's: (\S+)", sums) == pytest.approx(by_hand, abs=1e-4)
    table = re.findall(r"^ +(\d+)  (\D+?) +(\d\.\d+) +(\d+)$", heads, re.MULTILINE)
    illegal = {(int(step), head): int(count) for step, head, _, count in table}
    f1 = {(int(step), head): float(score) for step, head, score, _ in table}
    assert len(f1) == 6
    assert illegal[40, "softmax"] > 0
    assert {count for (_, head), count in illegal.items() if head != "softmax"} == {0}
    assert f1[40, "softmax"] < f1[40, "softmax + rules"]
    assert f1[40, "crf"] < f1[80, "crf"]
    assert f1[80, "crf"] > 0.5
    assert re.search(r"^   → .* I-\w+ *(B-\w+|I-\w+|O)$", broken, re.MULTILINE)
    liked = [float(score) for score in re.findall(r"liked +(\S+)  ", moves)]
    avoided = [float(score) for score in re.findall(r"avoided +(\S+)  ", moves)]
    assert len(liked) == len(avoided) == 5
    assert min(liked) > 0 > max(avoided)


def test_10_the_translator_is_compared_with_what_costs_nothing(tmp_path: Path) -> None:
    training, found, beams, picture = parts(run("10_translate.py", tmp_path, "small"))
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", training)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    table = re.findall(r"^   (\D+?) +(\d+\.\d) +(\d+\.\d)%$", found, re.MULTILINE)
    assert [name for name, *_ in table[:2]] == ["the source, copied", "a dictionary"]
    assert re.findall(r"^   (greedy|4 beams) ", found, re.MULTILINE) == ["greedy", "4 beams"]
    scores = {name: (float(bleu), float(exact)) for name, bleu, exact in table}
    assert scores["the source, copied"] == (0.0, 0.0)
    assert min(scores["a dictionary"]) > 30
    weighed = [float(score) for score in re.findall(r"^ +(-\d+\.\d+)  ", beams, re.MULTILINE)]
    assert len(weighed) == 4
    assert weighed == sorted(weighed, reverse=True)
    rows = [line[5:] for line in picture.splitlines()[2:]]
    assert "".join(row[0] for row in rows) == "set_log_level$"
    assert {len(row) for row in rows} == {2 + len("setloglevel$")}
    assert any("#" in row for row in rows)


def test_11_every_number_of_the_bert_stands_beside_one_that_is_no_skill(tmp_path: Path) -> None:
    training, blanks, probes = parts(run("11_pretrain_a_small_bert.py", tmp_path, "small"))
    rows = re.findall(r"^ +(\d+|none) +(\S+) +(\S+)% +(\S+) +(\S+)%$", training, re.MULTILINE)
    assert [step for step, *_ in rows] == ["10", "20", "30", "40", "none"]
    losses = [float(loss) for _, loss, *_ in rows]
    assert losses[0] > losses[3]
    assert 5 < losses[-1] < losses[0]  # the unigram model
    filled = [line.split("   ")[-1].split() for line in blanks.splitlines()[1:] if line]
    assert len(filled) == 3
    assert {len(words) for words in filled} == {5}
    assert probes.count(" is near ") == 2
    usual = number(r"is right for (\S+)%", probes)
    for name in ("pretrained", "random"):
        assert number(rf"{name} .* by a linear probe +(\S+)%", probes) > usual


def test_12_every_mean_has_its_spread_and_every_difference_its_noise(tmp_path: Path) -> None:
    _, runs, best = parts(run("12_fine_tune_or_start_afresh.py", tmp_path, "small"))
    row = r"^ +(\d+) +(\S+) +(\S+) ± (\S+) +(\S+) ± (\S+) +(\S+) ± (\S+?)(  \(within.*)?$"
    table = re.findall(row, runs, re.MULTILINE)
    assert [(labels, rate) for labels, rate, *_ in table] == [
        ("40", "0.0005"),
        ("40", "0.002"),
        ("80", "0.0005"),
        ("80", "0.002"),
    ]
    for _, _, scratch, spread, tuned, other, gain, noise, within in table:
        assert float(gain) == pytest.approx(float(tuned) - float(scratch), abs=0.11)
        expected = ((float(spread) ** 2 + float(other) ** 2) / 3) ** 0.5
        assert float(noise) == pytest.approx(expected, abs=0.11)
        if abs(abs(float(gain)) - 2 * float(noise)) > 0.2:
            assert bool(within) == (abs(float(gain)) < 2 * float(noise))
    assert len(re.findall(r"counting words: (\S+)%", runs)) == 2
    for labels in ("40", "80"):
        ours = [float(tuned) for count, _, _, _, tuned, *_ in table if count == labels]
        assert number(rf"{labels} labels: .*, (\S+) fine-tuned", best) == max(ours)


@pytest.mark.parametrize("lesson", LESSONS[4:7], ids=lambda path: path.stem)
def test_without_triton_a_lesson_on_kernels_says_what_to_install(
    lesson: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "triton.py").write_text("raise ImportError('as if it were not installed')\n")
    output = run(lesson, tmp_path, PYTHONPATH=str(hidden))
    assert output.count("\n") == 1
    assert "pip install triton" in output


@pytest.mark.parametrize("lesson", LESSONS[:3], ids=lambda path: path.stem)
def test_a_lesson_prints_the_same_every_time(lesson: Path, tmp_path: Path) -> None:
    assert run(lesson, tmp_path) == run(lesson, tmp_path)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_can_be_read_in_one_sitting(lesson: Path) -> None:
    source = lesson.read_text(encoding="utf-8")
    assert 40 <= len(source.splitlines()) <= 150
    module = ast.parse(source)
    title = (ast.get_docstring(module) or "").partition("\n")[0]
    assert title.startswith(f"Lesson {int(lesson.name[:2])}: ")
    last = module.body[-1]
    assert isinstance(last, ast.If)
    assert ast.unparse(last.test) == "__name__ == '__main__'"
    packages = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
        for node in ast.walk(module)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    roots = {name.partition(".")[0] for name in packages} - sys.stdlib_module_names
    assert roots == {"numpy", "tinygrad_llm"}  # nothing to plot with, nothing else to install


def test_the_index_names_every_lesson_and_every_lesson_is_tested_here() -> None:
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\((\d\d_\w+\.py)\)", index)
    assert linked == [lesson.name for lesson in LESSONS]
    tested = re.findall(r'run\("(\w+\.py)", tmp_path\W', Path(__file__).read_text(encoding="utf-8"))
    assert tested == linked
