"""What compares outputs: models on equal images, rows of each image, grids of pictures."""
