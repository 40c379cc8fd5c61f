"""What the features of a frozen network tell of a collection."""
