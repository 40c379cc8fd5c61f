"""What is decided before a run begins: rules, facts of a collection, memory, weights to begin from."""
