"""Preflight: what is asked before GPU hours are spent: `doctor`, `plan` and `conformance`.

Imports nothing: `python -m btrm_core.preflight.conformance.probe` measures what importing a family costs.
"""
