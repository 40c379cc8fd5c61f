"""What is decided before a run begins: the list of changes, rules, measurements."""
