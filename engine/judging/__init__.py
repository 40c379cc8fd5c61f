"""Compare outputs: models on equal images, a row for each image."""
