"""Prompts, samplers, and the pictures that networks draw."""
