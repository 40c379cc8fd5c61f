"""How a stranger's kind gets into the table, and its own finetune-like command."""

from pathlib import Path

from engine.tasks.kinds import KINDS, KindRow
from utils.config.entry_point import Command


def add_kind(name, kind, config, schema):
    """Add names of a kind and its config to the table; returns its command, with conf/<name>.yaml beside this file."""
    KINDS[name] = KindRow(kind, config, ())
    return Command(name, "engine.train:train", schema, Path(__file__).parent / "conf")
