"""Settings of other programs, for prepare.py job=import: a table for each, and recipe.yaml for what is trained."""
