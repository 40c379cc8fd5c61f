"""What files of taggers and SDXL say: tags, vocabularies, thresholds, emphasis, backgrounds."""
