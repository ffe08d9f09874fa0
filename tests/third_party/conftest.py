"""The packages here are other people's: their tests run where they are installed, see `tests/test_third_party.py`."""

collect_ignore_glob = ["btrm-*"]
