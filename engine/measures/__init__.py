"""Exact measures of an evaluation, equal on any number of ranks.

Each has the same form: `add(...)` takes a batch and never waits for the device; `reduce()` combines all ranks and
returns the result on each of them. Every rank calls `reduce` once, at the end.
"""
