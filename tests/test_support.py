"""Tests of what the tests use."""

import importlib


def test_everything_that_test_processes_preload_can_be_imported():
    """The fork server ignores an ImportError; each test process would then import everything itself, for seconds."""
    importlib.import_module("tests.preload")
