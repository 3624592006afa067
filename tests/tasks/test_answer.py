"""Question answering as a task: the loss, the best passage, no answer, long contexts, scores."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import manual_seed
from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data.answers import AnswerWindows
from tinygrad_llm.data.questions import Answer, Questions
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.bert import BertConfig, BertForQuestionAnswering
from tinygrad_llm.tasks.answer import AnswerCollator, AnswerTask, best_spans, read
from tinygrad_llm.train.parallel import cut

NAMES, TOWNS = ["Ada", "Bob", "Eva", "Gus"], ["Rome", "Oslo", "Lima", "Bern"]
TOKENIZER = Tokenizer.wordpiece(" ".join(["who where why went to . ?", *NAMES, *TOWNS] * 4), 90)


def questions(count=32, seed=0, name="train", why=False, filler=0):
    """'Ada went to Rome.': who? where? and, where asked for, why?, which has no answer."""
    rng = np.random.default_rng(seed)
    asked, contexts, answers = [], [], []
    for i in range(count):
        who, where = NAMES[rng.integers(4)], TOWNS[rng.integers(4)]
        context = "went . " * filler * (i % 2) + f"{who} went to {where}." + " went ." * filler
        kind = i % (3 if why else 2)
        asked.append(["who?", "where?", "why?"][kind])
        contexts.append(context)
        text = [who, where, ""][kind]
        answers.append([Answer(text, context.index(text))] if text else [])
    return Questions(name, asked, contexts, answers, list(range(1, count + 1)))


def task(train=None, validation=None, **options):
    train = questions() if train is None else train
    validation = questions(12, 1, "validation") if validation is None else validation
    settings: dict[str, Any] = {"max_length": 24, "batch_size": 8, "seed": 3, **options}
    return AnswerTask(train, validation, TOKENIZER, **settings)


def bert(**options):
    manual_seed(0)
    return BertForQuestionAnswering(
        BertConfig(
            **{
                "vocab_size": TOKENIZER.vocab_size,
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "max_position_embeddings": 40,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
                "initializer_range": 0.2,
                **options,
            }
        )
    )


def trained(ours, steps, lr=1e-2):
    from tinygrad_llm.optim import Adam

    model = bert()
    optimizer = Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        ours.loss(model, ours.next_batch()).backward()
        optimizer.step()
    return model


# --- the loss -------------------------------------------------------------------------------------


def test_the_loss_is_the_models_own_where_nothing_is_filled_up():
    ours, model = task(), bert()
    batch = ours.next_batch()
    assert batch["attention_mask"].all()
    theirs = model.loss(
        batch["input_ids"],
        batch["start_positions"],
        batch["end_positions"],
        batch["attention_mask"],
        batch["token_type_ids"],
    )
    assert ours.loss(model, batch).item() == pytest.approx(theirs.item(), rel=1e-6)


def test_what_fills_a_row_up_has_no_part_in_the_loss():
    ours, model = task(), bert()
    batch = ours.next_batch()
    plain = ours.loss(model, batch).item()
    wider = {
        name: np.pad(array, [(0, 0), (0, 5)]) if array.ndim == 2 else array
        for name, array in batch.items()
    }
    assert ours.loss(model, wider).item() == pytest.approx(plain, rel=1e-5)


def test_parts_of_a_batch_add_up_and_half_precision_is_near():
    ours, model = task(questions(28), batch_size=7), bert()
    batch = ours.next_batch()
    assert ours.size(batch) == 7
    whole = ours.loss(model, batch).item()
    parts = cut([batch], 3, ours.size, RandomStream(0))
    total = sum(ours.loss(model, part.batch).item() * part.weight for part in parts)
    assert total == pytest.approx(whole, rel=1e-5)
    half = ours.loss(model.to("float16"), batch)
    assert half.dtype == "float32"
    assert half.item() == pytest.approx(whole, rel=2e-2)


# --- batches --------------------------------------------------------------------------------------


def test_an_epoch_has_every_window_once_and_the_next_another_order():
    ours = task(questions(22), batch_size=4)
    assert ours.steps_per_epoch == 6
    epochs = []
    for _ in range(2):
        rows = []
        for _ in range(6):
            batch = ours.next_batch()
            targets = zip(batch["start_positions"], batch["end_positions"], strict=True)
            rows += [
                (*ids[mask == 1].tolist(), *map(int, target))
                for ids, mask, target in zip(
                    batch["input_ids"], batch["attention_mask"], targets, strict=True
                )
            ]
        epochs.append(rows)
    assert Counter(epochs[0]) == Counter(epochs[1])
    assert len(epochs[0]) == 22
    assert epochs[0] != epochs[1]


def test_the_position_is_the_state():
    ours, other = task(), task()
    for _ in range(7):
        ours.next_batch()
    other.load_state(ours.state())
    for _ in range(5):
        a, b = ours.next_batch(), other.next_batch()
        assert all(np.array_equal(a[key], b[key]) for key in a)
    with pytest.raises(ValueError, match="questions of train have changed since the run began"):
        task(questions(20, 5)).load_state(ours.state())


def test_answers_that_no_window_shows_are_not_learnt_from():
    long = questions(8, filler=20)
    ours = task(long, long="cut")
    rows = sum(ours.size(ours.next_batch()) for _ in range(ours.steps_per_epoch))
    assert rows == 4  # of the others the answer comes too late
    assert any("no window shows as a whole" in note for note in ours.notes)
    late = Questions("late", long.questions[1::2], long.contexts[1::2], long.answers[1::2], [1] * 4)
    with pytest.raises(ValueError, match="no window of 24 pieces shows a whole answer"):
        task(late, long="cut")


# --- the best passage -----------------------------------------------------------------------------


@given(
    n=st.integers(1, 12),
    most=st.integers(1, 6),
    count=st.integers(1, 30),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_the_best_spans_are_those_of_all_that_may_be(n, most, count, seed, data):
    rng = np.random.default_rng(seed)
    begin, end = rng.integers(-3, 4, n).astype(float), rng.integers(-3, 4, n).astype(float)
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    every = [
        (begin[i] + end[j], i, j)
        for i in range(n)
        for j in range(i, min(n, i + most))
        if allowed[i] and allowed[j]
    ]
    every.sort(key=lambda span: (-span[0], span[1], span[2]))
    assert best_spans(begin, end, allowed, most, count) == every[:count]


class Fixed:
    """A model whose logits are given: rows by the first piece of the context."""

    config: Any = None
    training = False

    def __init__(self, logits):
        self.logits, self.parameter = logits, bert().qa_outputs.weight

    def __call__(self, input_ids, attention_mask, token_type_ids, /):
        from tinygrad_llm.models.bert import SpanLogits
        from tinygrad_llm.tensor import Tensor

        begin, end = (np.full(input_ids.shape, -5.0, np.float32) for _ in range(2))
        for row, ids in enumerate(input_ids):
            for place, piece in enumerate(ids):
                begin[row, place], end[row, place] = self.logits.get(int(piece), (-5.0, -5.0))
        return SpanLogits(Tensor(begin), Tensor(end))

    def parameters(self):
        return [self.parameter]

    def train(self):
        return self

    def eval(self):
        return self


def one(context, **scores):
    """The guess where pieces have these logits of begin and end."""
    options = scores.pop("options", {})
    ids = {TOKENIZER.token_to_id(piece): value for piece, value in scores.items()}
    if "cls" in scores:
        ids[TOKENIZER.token_to_id("[CLS]")] = scores["cls"]
    windows = AnswerWindows(TOKENIZER, ["who?"], [context], max_length=options.pop("room", 40))
    collate = AnswerCollator(TOKENIZER)
    return read(Fixed(ids), windows, [context], collate, **options).guesses[0]


def test_begin_comes_before_end_and_both_in_the_context():
    found = one("Ada went to Rome", rome=(3.0, 0.0), ada=(2.0, 4.0), who=(9.0, 9.0))
    assert (found.text, found.start, found.stop) == ("Ada", 0, 3)
    found = one("Ada went to Rome", ada=(4.0, 0.0), rome=(0.0, 4.0))
    assert (found.text, found.start, found.stop) == ("Ada went to Rome", 0, 16)
    found = one("Ada went to Rome", ada=(4.0, 0.0), rome=(0.0, 4.5), options={"most": 2})
    assert found.text == "Rome"
    assert 0 < found.probability < 1


def test_there_is_no_answer_only_where_training_had_such():
    sure = {"ada": (2.0, 2.0), "cls": (9.0, 9.0)}
    assert one("Ada went to Rome", **sure).text == "Ada"
    found = one("Ada went to Rome", **sure, options={"unanswerable": True})
    assert (found.text, found.start, found.stop) == ("", None, None)
    assert found.probability > 0.99
    found = one("Ada went to Rome", ada=(9.0, 9.0), cls=(2.0, 2.0), options={"unanswerable": True})
    assert found.text == "Ada"


def test_no_answer_is_what_every_window_says():
    context = "went . " * 30 + "Ada."
    options = {"unanswerable": True, "room": 20}
    found = one(context, ada=(5.0, 5.0), cls=(4.0, 4.0), options=options)
    assert found.text == "Ada"  # in the last window, though all others say that there is none
    assert found.start == len("went . " * 30)
    assert one(context, cls=(4.0, 4.0), options=options).text == ""


def test_a_passage_that_several_windows_show_counts_once():
    context = "went . " * 9 + "Ada." + " went ." * 9
    windows = AnswerWindows(TOKENIZER, ["who?"], [context], max_length=24)
    ada = TOKENIZER.token_to_id("ada")
    assert sum(ada in windows.window(k).ids for k in range(len(windows))) > 1
    found = one(context, ada=(9.0, 9.0), cls=(4.0, 4.0), options={"room": 24})
    assert found.probability > 0.99


def test_a_context_of_nothing_has_no_answer():
    found = one("\u200b")
    assert (found.text, found.start, found.probability) == ("", None, 1.0)


# --- learning -------------------------------------------------------------------------------------


def test_learning_answers_every_question():
    ours = task()
    before = ours.evaluate(bert())
    model = trained(ours, 60)
    after = ours.evaluate(model)
    assert after["val_loss"] < 0.1 < before["val_loss"]
    assert after["val_f1"] == after["val_exact"] == 1.0
    assert ours.score in after
    assert [guess.text for guess in ours.predicted(model)] == [t[0] for t in ours.held_out.texts]
    assert "exact match 1.0000" in str(ours.remark(after))
    assert not ours.unanswerable


def test_learning_also_when_there_is_no_answer():
    ours = task(questions(48, why=True), questions(15, 1, "validation", why=True))
    assert ours.unanswerable
    model = trained(ours, 90)
    assert ours.evaluate(model)["val_exact"] == 1.0
    empty = [guess.text == "" for guess in ours.predicted(model)]
    assert empty == [question == "why?" for question in ours.held_out.questions]


def test_long_contexts_are_answered_from_the_window_that_shows_the_answer():
    ours = task(questions(32, filler=12), questions(12, 1, "validation", filler=12))
    assert len(ours.val_windows) > 12
    model = trained(ours, 150)
    assert ours.evaluate(model)["val_exact"] == 1.0
    guesses = ours.predicted(model)
    for guess, context in zip(guesses, ours.held_out.contexts, strict=True):
        assert context[guess.start : guess.stop] == guess.text


def test_scores_do_not_depend_on_the_batches():
    long = questions(11, 1, "validation", filler=8)
    model = bert()
    found = [task(validation=long, eval_batch_size=n) for n in (1, 4, 64)]
    first, *others = [ours.evaluate(model) for ours in found]
    for other in others:
        assert other["val_loss"] == pytest.approx(first["val_loss"], rel=1e-5)
    texts = [[guess.text for guess in ours.predicted(model)] for ours in found]
    assert texts[0] == texts[1] == texts[2]
    losses = [
        (ours.loss(model, b).item(), ours.size(b)) for ours in found[:1] for b in ours.validation()
    ]
    mean = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    assert mean == pytest.approx(first["val_loss"], rel=1e-5)


# --- what constants have, and what is said --------------------------------------------------------


def test_the_usual_answer_and_the_usual_one_in_the_context():
    def asked(*pairs):
        contexts = [context for context, _ in pairs]
        answers = [[Answer(text, context.index(text))] if text else [] for context, text in pairs]
        return Questions("x", ["who?"] * len(pairs), contexts, answers, list(range(len(pairs))))

    train = asked(*[("Ada.", "Ada")] * 3, *[("Bob.", "Bob")] * 2, ("Eva.", "Eva"))
    validation = asked(("Bob met Eva.", "Eva"), ("Gus met Ada.", "Gus"), ("Oslo.", "Oslo"))
    ours = task(train, validation)
    assert ours.usual_answer() == "Ada"
    assert ours.usual_answers() == ["Bob", "Ada", ""]
    never = task(asked(*[("Ada.", "")] * 3, ("Ada.", "Ada")), validation)
    assert never.usual_answer() == ""
    assert never.usual_answers() == ["", "", ""]


def test_notes_say_what_spoils_the_scores():
    same = questions(8, 0, "validation", why=True)
    same.answers[0] = [Answer(".", same.contexts[0].index("."))]
    said = " ".join(task(questions(8), same).notes)
    assert "to validate with are also among those that are trained on" in said
    assert "2 of 8 questions to validate with have no answer, and none that is trained on" in said
    assert "1 of 8 questions to validate with have an answer of nothing but punctuation" in said


def test_the_longest_answer_is_kept_for_new_questions(tmp_path):
    import json

    ours = task(about={"task": "qa"})
    ours.save(tmp_path)
    about = json.loads((tmp_path / "task.json").read_text())
    assert about == {"task": "qa", "unanswerable": False, "longest_answer": 30}
    long = questions(8, filler=40)
    text = long.contexts[0]
    long.answers[0] = [Answer(text, 0)]
    assert task(long, max_length=200).most == len(TOKENIZER.encode(text)) > 30


def test_transformers_reads_learns_and_answers_the_same(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ours, model = task(validation=questions(24, 5, "validation")), bert()
    model.save_pretrained(tmp_path)
    theirs = transformers.BertForQuestionAnswering.from_pretrained(tmp_path).eval()
    model.eval()
    windows, held = ours.val_windows, ours.held_out
    for k, guess in enumerate(ours.predicted(model)):
        batch = ours.collate(windows, [k])
        tensors = {name: torch.tensor(array) for name, array in batch.items()}
        with torch.no_grad():
            found = theirs(**tensors)
        assert ours.loss(model, batch).item() == pytest.approx(found.loss.item(), rel=1e-5)
        encoding = TOKENIZER.tokenizer.encode(held.questions[k], held.contexts[k])
        assert batch["input_ids"][0].tolist() == encoding.ids
        places = [i for i, text in enumerate(encoding.sequence_ids) if text == 1]
        begin, end = found.start_logits[0].numpy(), found.end_logits[0].numpy()
        spans = ((begin[i] + end[j], -i, -j) for i in places for j in places if i <= j < i + 30)
        _, i, j = max(spans)
        start, stop = encoding.offsets[-i][0], encoding.offsets[-j][1]
        assert held.contexts[k][start:stop] == guess.text
