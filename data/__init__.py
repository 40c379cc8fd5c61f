"""Collections of images, and the way from their files to batches."""
