"""Weights of others and our own: recognised by their tensors' names, converted, and loaded strictly or not at all."""
