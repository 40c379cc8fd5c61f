"""A root script with the strangers' kinds in its table:  python -m tests.tasks.stranger evaluate run_dir=RUN"""

import importlib
import sys

import tests.tasks.flow
import tests.tasks.multicrop  # noqa: F401 (each adds its kind to the table)

if __name__ == "__main__":
    importlib.import_module(sys.argv.pop(1)).main()
