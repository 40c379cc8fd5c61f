"""One run: loop, start, checkpoints, recorder, range test, length, advice."""
