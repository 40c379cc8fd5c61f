"""What the features of a frozen network tell about a collection."""
