"""SDXL and its VAE, whole: tasks and kinds, noise, LoRAs, files of others, caches, pictures, exports."""
