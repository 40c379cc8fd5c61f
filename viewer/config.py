"""The shape of `view` in conf/view.yaml."""

from typing import Annotated

from pydantic import Field

from utils.config.schema import Strict


class PageConfig(Strict):
    """Where the page is served. open: in the browser. token: who knows it may read, from other machines, too.

    start: whether who can open the page may start trainings; None: if it answers this machine alone.
    """

    host: Annotated[str, Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65_535)]
    open: bool
    start: bool | None
    token: Annotated[str, Field(min_length=16, pattern=r"^[\w.~-]+$")] | None
