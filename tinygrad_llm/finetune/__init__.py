"""Fine-tuning on labelled data: one run (`run.py`), and for each task a kind that it works with.

kind.py         what a kind is          kinds.py     all of them, by name
config.py       sections and presets    run.py       a run from its data to its scores
tables.py       columns of files        encoders.py  checkpoints, and heads for them
documents.py    texts without labels    layers.py    rates by layer
texts.py, tags.py, translation.py …     the kinds
predict.py      what a fine-tuned model says of new data
"""
