"""Processes: ranks and their collectives, signals, the watchdog, process pools."""
