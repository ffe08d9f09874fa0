"""Sequence parallelism: the tokens of a row over several processes, each with some of the heads of attention.

`share` says which part of a row is whose and moves what attention needs; `check` decides beforehand, and on the model
at hand, whether that computes the same.
"""
