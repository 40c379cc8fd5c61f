"""Caches of decoded images: each is a source in front of another."""
