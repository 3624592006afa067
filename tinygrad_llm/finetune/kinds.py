"""All kinds of fine-tuning by the name of their task."""

from __future__ import annotations

from tinygrad_llm.finetune.answers import Answering
from tinygrad_llm.finetune.config import TaskName
from tinygrad_llm.finetune.kind import Kind
from tinygrad_llm.finetune.lm import LanguageModelling
from tinygrad_llm.finetune.multi import Several
from tinygrad_llm.finetune.tags import Tagging
from tinygrad_llm.finetune.texts import Classification
from tinygrad_llm.finetune.translation import Translation

KINDS: dict[TaskName, Kind] = {
    "classify": Classification(),
    "pair": Classification(pairs=True),
    "tag": Tagging(),
    "translate": Translation(),
    "qa": Answering(),
    "lm": LanguageModelling(),
    "multi": Several(),
}
