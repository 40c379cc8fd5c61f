"""One update: step, learner, CUDA graphs, data parallelism, micro-batches, the machine."""
