"""Tags: from what a collection has to the outputs of a tagger."""
