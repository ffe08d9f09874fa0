"""Inputs: the bytes and tables that rows are read from.

`spec` takes apart what a user writes after `--data`, `streams` opens files, pipes and compressed files, `tables` reads
Parquet, Arrow and `datasets`, `hub` asks the Hugging Face Hub.
"""
