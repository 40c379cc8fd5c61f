"""From a weight file to a task, and from a task to the files of other programs (docs/weights.md)."""
