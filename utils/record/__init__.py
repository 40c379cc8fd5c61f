"""The record of a run: log, metrics, pictures, trackers, the run folder."""
