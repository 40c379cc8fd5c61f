"""Checks of files that strangers made, one module per format. Call them where a file enters the program."""
