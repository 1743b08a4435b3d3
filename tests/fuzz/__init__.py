"""Mutated files, read by the product's own readers in forked children: `python -m tests.fuzz`."""
