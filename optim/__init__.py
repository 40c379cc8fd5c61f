"""Optimisers, parameter groups, schedules, EMA, and ridge regression in closed form. Imports only utils."""
