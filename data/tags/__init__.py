"""Tags: from the texts in users' files to the ids that a tagger is trained on."""
