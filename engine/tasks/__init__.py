"""The kinds of training, one file each, and the table of them (kinds.py)."""
