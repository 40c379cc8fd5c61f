"""The step, the loop, checkpoints and tasks. Imports utils and optim; engine/tasks also models and data."""
