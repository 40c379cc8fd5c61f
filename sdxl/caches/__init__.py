"""The caches of latents and of texts, buckets of sizes, and masks."""
