"""Tools that look after a collection: prepare.py runs them, docs/care.md explains them."""
