"""Optimisers, parameter groups, schedules and EMA. Imports utils only."""
