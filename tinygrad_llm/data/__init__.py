"""From raw text to batches.

`corpora` and `files` give text, `tokenizers` make ids of it, `loader` makes (x, y) of the ids.

The modules are imported by name (`from tinygrad_llm.data.tokenizers import Tokenizer`), so that
nobody loads the `tokenizers` library who does not need it.
"""

END_OF_TEXT = "<|endoftext|>"  # GPT-2's mark between documents: in a text, and as one token id
