"""Mutants are wrong on purpose; graders hold checks and no tests. test_graders.py runs them."""

collect_ignore_glob = ["mutants/*", "alternatives/*", "test_[0-9]*.py"]
