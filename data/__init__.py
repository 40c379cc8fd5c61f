"""Collections of images: from files to batches."""
