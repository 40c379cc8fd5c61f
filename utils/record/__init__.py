"""What a run leaves behind: log, metrics, pictures, trackers, the run folder."""
