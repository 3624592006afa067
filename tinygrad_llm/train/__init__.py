"""Training: `config` (what), `run` (the folder), `trainer` (the loop), `task` (what it asks of a
task and a model), `gradient` (forward and backward), `step` (the ways to make a step: with
`parallel`, several processes; `precision`, half; `graph`, one launch), `readback` (what a GPU tells
late), `transfer` (batches on their way to it), `memory` and `shortage`, `signals`, `checkpoint`,
`log`, `plot`, `seeds` (several runs), `samples`, `utilisation`.

`pretrain` puts them together with a text, a tokenizer and a model. Imported by name, so that the
command line loads only what a command needs.
"""
