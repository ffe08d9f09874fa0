"""The checks behind `btrm_core.testing`, which is the public name: what the contract of a family means, as code.

`subject` makes what is checked (tokenizer, tiny model, encoded pairs), `contract`, `text` and `model` check it, and
`probe` is what a check runs in a process of its own.
"""
