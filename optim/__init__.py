"""Optimisers, parameter groups, schedules and EMA. Imports only utils."""
