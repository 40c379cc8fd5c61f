"""Weights in and out of tasks: a weight file to a task, a task to the files of other programs (docs/weights.md)."""
