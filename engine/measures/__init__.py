"""Measures of an evaluation, exact on any number of ranks.

`add(...)` takes a batch without waiting for the device. `reduce()` returns the result over all ranks. All ranks call
`reduce()` once, at the end.
"""
