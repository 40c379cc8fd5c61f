"""From a trained network to the files that other tools read, each compared before it is kept."""
