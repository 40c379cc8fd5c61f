"""Optimisers, parameter groups, schedules, EMA, and linear classifiers that are fitted at once. Imports only utils."""
