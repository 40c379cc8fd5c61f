"""How a stranger's kind gets into the table, and its own finetune-like command."""

from pathlib import Path

from engine.tasks.kinds import KINDS
from engine.train import train
from utils.config.entry_point import Command


def add_kind(name, kind, schema):
    """Add a kind to the table; returns the command that trains it, with conf/<name>.yaml beside this file."""
    KINDS[name] = kind
    return Command(name, train, schema, Path(__file__).parent / "conf")
