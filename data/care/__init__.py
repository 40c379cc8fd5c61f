"""Tools that look after a collection: prepare.py runs them, docs/collections.md explains them."""
