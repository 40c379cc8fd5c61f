"""What every room may use: configuration, ranks, logging, files, random keys, the run folder. Imports no room."""
