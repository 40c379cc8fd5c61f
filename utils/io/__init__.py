"""Files: atomic writes, weight files, and checks of files that strangers made."""
