"""Training: `config` (what), `run` (the folder), `trainer` (the loop), `parallel` (several
processes a step), `precision` (half), `readback` (what a GPU tells late), `transfer` (batches on
their way to it), `graph` (a step as one launch), `memory`, `checkpoint`, `log`, `plot`, `seeds`
(several runs), `samples`, `utilisation`.

`pretrain` puts them together with a text, a tokenizer and a model. Imported by name, so that the
command line loads only what a command needs.
"""
