"""Tags of images: from users' files to the ids that a tagger is trained on."""
