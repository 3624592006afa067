"""From raw text to batches.

    files, corpora, download    where text is: files of one's own, built-in corpora, the network
    texts                       the same in parts, however large; what a tokenizer learns from
    tokenizers                  text ↔ ids
    tokens, token_files         the ids of a text, in memory or mapped from the cache
    loader                      ids → batches (x, y)
    dataset                     PyTorch's DataLoader, for a training loop of one's own

The modules are imported by name (`from tinygrad_llm.data.tokenizers import Tokenizer`), so that
nobody loads the `tokenizers` library who does not need it.
"""

END_OF_TEXT = "<|endoftext|>"  # GPT-2's mark between documents: in a text, and as one token id
