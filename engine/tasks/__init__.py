"""The kinds of training, one file each. May import models and data/batch.py beside what the engine may."""
