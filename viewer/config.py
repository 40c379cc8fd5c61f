"""The shape of `view` in conf/view.yaml."""

from typing import Annotated

from pydantic import Field

from utils.config.bounds import Name, between
from utils.config.schema import Strict


class PageConfig(Strict):
    """The address of the page. open: open it in the browser. token: a password, for other machines too.

    start: whether a reader of the page may start trainings; None: only if the page answers this machine alone.
    """

    host: Name
    port: between(int, 1, 65_535)
    open: bool
    start: bool | None
    token: Annotated[str, Field(min_length=16, pattern=r"^[\w.~-]+$")] | None
