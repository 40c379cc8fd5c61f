"""The server that test processes are forked from (tests/preload.py)."""

from tests.support import FORKS


def list_packages_of_sdxl():
    from tests import preload

    return preload.IMPORTED_BY_SCRIPTS


def test_everything_can_be_imported_and_no_script_imports_the_packages_of_sdxl_at_its_start():
    """The server ignores an ImportError; finetune_sdxl.py says what is missing before it builds a network."""
    with FORKS.Pool(1) as pool:
        assert pool.apply(list_packages_of_sdxl) == set()
