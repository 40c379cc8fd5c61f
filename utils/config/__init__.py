"""The configuration: from the command line to one validated object, and what makes a recipe."""
