"""translate from start to end: a T5 and its own end of texts, prefixes, columns, what is shown."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from tinygrad_llm import manual_seed
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.finetune import config as finetune_config
from tinygrad_llm.finetune import run as finetune
from tinygrad_llm.finetune.config import FinetuneConfig
from tinygrad_llm.finetune.kinds import KINDS
from tinygrad_llm.finetune.predict import Columns, Predictor
from tinygrad_llm.finetune.translation import Translating
from tinygrad_llm.models.t5 import T5, T5Config
from tinygrad_llm.tasks.span import with_sentinels
from tinygrad_llm.train.config import ConfigError, merge
from tinygrad_llm.train.log import QuietLog

pytest.importorskip("sacrebleu")

WORDS = {"rot": "red", "blau": "blue", "haus": "house", "ball": "ball"}
PREFIX = "translate: "


def write_pairs(path: Path, count: int = 120, more: str = "") -> str:
    rng = np.random.default_rng(0)
    names = list(WORDS)
    lines = []
    for _ in range(count):
        chosen = [names[i] for i in rng.integers(4, size=2)]
        lines.append(f"{' '.join(chosen)}\t{' '.join(WORDS[w] for w in chosen)}{more}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def config_of(data: str, **changes: Any) -> FinetuneConfig:
    begun = finetune_config.preset("tiny", "translate")
    sections: dict[str, Any] = {"data": {"source": data}, "model": {}, "train": {}}
    homes = {"data": begun.data, "model": begun.model, "train": begun.train}
    for key, value in {"processes": 1, "device": "cpu", **changes}.items():
        sections[next(name for name, home in homes.items() if hasattr(home, key))][key] = value
    return merge(begun, sections, where="the test")


def start(config: FinetuneConfig, folder: Path) -> Any:
    return finetune.start(config, folder, QuietLog())


def theirs() -> tuple[Tokenizer, int]:
    """A tokenizer as T5's, which adds </s> by itself, and the id of </s>."""
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz:"]
    words = [(f"▁{word}", -1.0) for pair in WORDS.items() for word in pair if word != "ball"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁ball", -1.0)]
    pieces += [*letters, *words]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return Tokenizer(made), 1


def ours() -> tuple[Tokenizer, int]:
    """That of `pretrain t5`, which ends with <|endoftext|> and has sentinels."""
    text = PREFIX + " ".join(f"{a} {b}" for a, b in WORDS.items()) * 9
    tokenizer = with_sentinels(Tokenizer.bpe(text, 310), 4)
    assert tokenizer.eos_id is not None
    return tokenizer, tokenizer.eos_id


def t5_folder(folder: Path, tokenizer: Tokenizer, end: int | None, pad: int = 0) -> str:
    manual_seed(2)
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    sizes["tie_word_embeddings"] = False  # as 1.1: it learns a few pairs faster
    special = {"eos_token_id": end, "pad_token_id": pad, "decoder_start_token_id": pad}
    T5(T5Config(tokenizer.vocab_size + 3, **special, **sizes)).save_pretrained(folder)
    tokenizer.save(folder)
    return str(folder)


@pytest.mark.parametrize("make", [theirs, ours])
def test_a_t5_is_fine_tuned_scored_and_translates(make: Any, tmp_path: Path):
    tokenizer, end = make()
    pad = 0 if make is theirs else end
    folder = t5_folder(tmp_path / "t5", tokenizer, end, pad)
    pairs = write_pairs(tmp_path / "pairs.tsv")
    changes: dict[str, Any] = {
        "prefix": PREFIX,
        "epochs": 24,
        "lr": 5e-3,
        "label_smoothing": 0.0,
        "max_length": 32,
    }
    changes |= {"checkpoint": folder, "header": "no", "val_source": pairs}  # known pairs
    config = config_of(pairs, **changes)
    ready = start(config, tmp_path / "run")
    batch = ready.task.next_batch()
    for ids, real, labels in zip(*batch, strict=True):
        for side in (ids[real].tolist(), labels[labels >= 0].tolist()):
            assert (side.count(end), side[-1]) == (1, end)
        assert tokenizer.decode(ids[real][:-1]).startswith(PREFIX)
    ready.trainer.fit()
    report, why_not = ready.report()
    assert report.scores.exact > 80 > report.scores.copied_exact
    assert why_not or (tmp_path / "run/metrics.png").stat().st_size > 1000
    assert "  written   " in (tmp_path / "run/metrics.txt").read_text(encoding="utf-8")
    about = json.loads((tmp_path / "run/checkpoints/best/task.json").read_text())
    assert (about["prefix"], about["num_beams"], about["max_length"]) == (PREFIX, 4, 32)

    opened = Predictor.open(str(tmp_path / "run"))
    rows, _ = opened.of_lines(["rot ball", "blau haus"])
    assert [row["translation"] for row in rows] == ["red ball", "blue house"]
    (tmp_path / "new.tsv").write_text("haus rot\tx\ny z\tball\n")
    rows, _ = opened.of_file(str(tmp_path / "new.tsv"), Columns(text="1", header=False))
    assert next(rows) == {"line": 1, "text": "haus rot", "translation": "house red"}


def test_what_a_t5_lacks(tmp_path: Path):
    pairs = write_pairs(tmp_path / "pairs.tsv")
    tokenizer, _ = theirs()
    endless = t5_folder(tmp_path / "endless", tokenizer, None)
    with pytest.raises(ConfigError, match="does not say which token ends a text"):
        start(config_of(pairs, checkpoint=endless), tmp_path / "run")
    (tmp_path / "endless/tokenizer.json").unlink()
    bare = t5_folder(tmp_path / "bare", tokenizer, 1)
    (tmp_path / "bare/tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a tokenizer\.json"):
        start(config_of(pairs, checkpoint=bare), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rates_and_sizes_that_are_chosen():
    kind = KINDS["translate"]
    config = config_of("x.tsv")
    tokenizer, _ = theirs()
    wide: Any = T5(T5Config(tokenizer.vocab_size, d_model=1024, d_kv=2, d_ff=4, num_layers=1))
    assert kind.defaults(config, wide).lr == pytest.approx(1.5e-4)
    assert config.train.label_smoothing == 0.1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"layer_decay": 0.9}, "--layer-decay is for a stack of layers"),
        ({"text_column": "2"}, "source and target are both column '2'"),
        ({"second_column": "1"}, "source and target are both column '1'"),
        ({"text_column": "7", "second_column": "1"}, "has no column 7"),
    ],
)
def test_what_cannot_be_is_said(changes: dict[str, Any], why: str, tmp_path: Path):
    pairs = write_pairs(tmp_path / "pairs.tsv")
    with pytest.raises(ValueError, match=why):
        start(config_of(pairs, header="no", **changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("section", "values", "flag"),
    [
        ("data", {"prefix": "x: "}, "--prefix"),
        ("model", {"num_beams": 2}, "--num-beams"),
        ("train", {"label_smoothing": 0.1}, "--label-smoothing"),
    ],
)
def test_other_tasks_do_not_take_what_is_for_translations(section, values, flag):
    with pytest.raises(ConfigError, match=f"{flag} is for translations"):
        merge(finetune_config.preset("tiny", "classify"), {section: values}, where="the test")
    for wrong in ({"label_smoothing": 1.0}, {"label_smoothing": -0.1}):
        with pytest.raises(ConfigError, match=r"label_smoothing must be in \[0, 1\)"):
            config_of("x.tsv", **wrong)
    with pytest.raises(ConfigError, match="num_beams must be at least 1"):
        config_of("x.tsv", num_beams=0)


# --- columns and scores ---------------------------------------------------------------------------


def test_a_third_column_of_attributions_is_passed_over_and_said(tmp_path: Path):
    more = "\tCC-BY 2.0 (France) Attribution: tatoeba.org #2877272 (CM) & #1158250 (Wittydev)"
    pairs = write_pairs(tmp_path / "deu-eng.txt", more=more)
    ready = start(config_of(pairs), tmp_path / "run")
    ready.run.close()
    note = next(note for note in ready.task.notes if "took column" in note)
    assert "took column 1 for the source and column 2 for the target, of 3" in note
    assert "--second-column" in note
    assert {word for source, _ in ready.task.pairs for word in source.split()} <= {*WORDS}
    back = config_of(pairs, text_column="2", second_column="1")
    train, _ = KINDS["translate"].read(back, QuietLog())
    assert {word for text in train.texts for word in text.split()} <= {*WORDS.values()}
    assert not [note for note in train.notes if "took column" in note]


def test_a_source_with_several_targets_is_scored_once(tmp_path: Path, monkeypatch: Any):
    pairs = tmp_path / "pairs.tsv"
    lines = [f"{i} rot\t{word} {i}" for i in range(30) for word in ("red", "ruby", "red")]
    pairs.write_text("\n".join(lines) + "\n")
    ready = start(config_of(str(pairs), header="no"), tmp_path / "run")
    ready.run.close()
    task: Translating = ready.task
    sources = sorted({source for source, _ in task.pairs})
    asked = []

    def ruby(model, tokenizer, texts, about):
        asked.extend(texts)
        return [f"ruby {text.split()[0]}" for text in texts]

    monkeypatch.setattr("tinygrad_llm.finetune.translation._translate", ruby)
    report: Any = task.report(ready.model)
    assert sorted(asked) == sources
    assert report.scores.exact == 100
    assert report.text().startswith(f"{pairs}, held out: {len(sources)} texts")
    assert report.scores.count == len(sources) == len(task.pairs) // 3
    assert f"{len(task.pairs)} held-out pairs have {len(sources)} sources" in report.text()
    assert report.written[0].right == [f"{w} {asked[0].split()[0]}" for w in ("red", "ruby")]
    monkeypatch.setattr("tinygrad_llm.finetune.translation.MOST_SCORED", 2)
    assert f"scored are the first 2 of {len(sources)} sources" in task.report(ready.model).text()
