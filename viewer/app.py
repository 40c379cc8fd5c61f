"""The local server: its pages, and the requests that it refuses."""

import logging
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from nicegui import app, ui
from starlette.datastructures import MutableHeaders
from starlette.formparsers import MultiPartParser
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from data.config import DataConfig
from data.layouts.names import is_remote
from data.layouts.walk import check_root
from utils.errors import UserError
from utils.record.logging import log
from utils.record.run_index import RunIndex
from viewer.collection import CollectionPage
from viewer.compare import ComparePage
from viewer.config import PageConfig
from viewer.images import Shelf, add_route
from viewer.label import LabelPage
from viewer.networks import Networks
from viewer.queue import Queue
from viewer.review import ReviewPage
from viewer.run import RunPage, add_pictures
from viewer.runs import RunsPage
from viewer.samples import SamplesPage
from viewer.site import PATIENCE_SEC, Site, add_missing_page, set_looks
from viewer.start import StartPage, add_drops, add_outlook, keep_queue_going
from viewer.try_image import MAX_BYTES, TryPage

_LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
_COOKIE = "atelier_token"
# Of every answer, refusals and errors too.
_HEADERS = [
    ("content-security-policy", "frame-ancestors 'none'"), ("referrer-policy", "no-referrer"),
    ("x-content-type-options", "nosniff"),
]  # fmt: skip
_PORTS = 20  # tried after view.port
_PAGES = (
    RunsPage, RunPage, ComparePage, SamplesPage, StartPage, CollectionPage, LabelPage, ReviewPage, TryPage,
)  # fmt: skip


class Guard:
    """Refuse requests without the token, and requests that a page of another site sends.

    Without a token, only requests that name this machine as their host pass: a page of another site could let its own
    name point to 127.0.0.1. Web sockets are checked alike. No site may show the page in a frame.
    """

    def __init__(self, inner: ASGIApp, token: str | None) -> None:
        self._inner = inner
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403."""
        if scope["type"] not in ("http", "websocket"):
            return await self._inner(scope, receive, send)
        request = HTTPConnection(scope)
        host = request.headers.get("host", "")
        given = request.query_params.get("token", "")
        is_new = self._is_token(given)
        if self._token is None:
            is_allowed = host.rsplit(":", 1)[0] in _LOOPBACK
        else:
            is_allowed = is_new or self._is_token(request.cookies.get(_COOKIE, ""))
        is_allowed &= request.headers.get("origin", host).rpartition("/")[2] == host
        # Without a length, a body would have no bound.
        is_bounded = "transfer-encoding" not in request.headers
        is_bounded &= int(request.headers.get("content-length", 0)) <= MAX_BYTES
        if not (is_allowed and is_bounded):
            refusal = PlainTextResponse("open the address that view.py prints; uploads are bounded", 403)
            return await refusal(scope, receive, send)

        async def answer(message: dict) -> None:
            if message["type"] == "http.response.start" and is_new:  # whatever else is given stays out of headers
                cookie = f"{_COOKIE}={given}; HttpOnly; SameSite=Strict; Path=/"
                MutableHeaders(scope=message).append("set-cookie", cookie)
            await send(message)

        return await self._inner(scope, receive, answer)

    def _is_token(self, word: str) -> bool:
        return self._token is not None and secrets.compare_digest(word.encode(), self._token.encode())


def choose_port(host: str, port: int) -> int:
    """Return a port, or else the next free one. Raises UserError (`view.port`) if the next ones are used, too.

    NiceGUI's finder takes a port for used that a server left a moment ago: the tabs of that server would lose it.
    """
    for wanted in range(port, port + _PORTS):
        with suppress(OSError, OverflowError):
            socket.create_server((host, wanted), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
            return wanted
    raise UserError(f"view.port: {port} to {wanted} are in use or refused; set another of 1024 or more")


def serve(
    roots: list[str],
    data: DataConfig,
    view: PageConfig,
    networks: Networks,
    list_prompts: Callable[[Path], Sequence[Any]],
) -> None:
    """Serve the page until it is interrupted. Raises UserError (`view.host`, `runs`)."""
    host = view.host
    token = view.token
    if host not in _LOOPBACK and (token is None or view.start):
        raise UserError(
            f"view.host: {host} lets other machines in; set view.token to a long random text and remove "
            "view.start=true, since other people could start trainings here; or set view.host=127.0.0.1"
        )
    index = RunIndex([Path(root) for root in roots])
    readable = [*index.roots[:1], Path.cwd(), Path.home()]
    if data.root and not is_remote(data.root):
        readable.append(check_root(data.root).resolve())
    for root in roots:
        if not Path(root).is_dir() and not data.root and root != "outputs":  # a fresh clone has none yet
            raise UserError(f"runs: {root} is no folder; name folders with runs, such as outputs")
    port = choose_port(host, view.port)
    queue = Queue(readable, index.roots[0], may_start=view.start is not False and host in _LOOPBACK)
    site = Site(index, Shelf(index, data if data.root else None), networks, queue, data, list_prompts)
    add_route(site.shelf)
    add_pictures(index)
    add_drops(queue, data.max_pixels)
    add_outlook(queue)
    keep_queue_going(queue)
    set_looks()
    add_missing_page(site)
    for page in _PAGES:
        site.add(page)
    # A tab that closes early would log this error.
    logging.getLogger("uvicorn.error").addFilter(lambda line: "No response returned" not in str(line.exc_info))
    MultiPartParser.spool_max_size = MAX_BYTES  # uploads stay in memory
    app.add_middleware(Guard, token=token)
    name = f"[{host}]" if ":" in host else host
    query = "" if token is None else "?token=TOKEN"
    app.on_startup(lambda: log.info("open http://%s:%d/%s in a browser; Ctrl+C ends it", name, port, query))
    opened = "/" + query.replace("TOKEN", str(token))
    import_module("torch")  # threads of two pages that import it at once abort the process
    ui.run(
        host=host, port=port, title="Atelier", reload=False, show=view.open and opened, show_welcome_message=False,
        favicon="🖼", dark=None, language="en-US", uvicorn_logging_level="error",
        reconnect_timeout=PATIENCE_SEC, headers=_HEADERS,
    )  # fmt: skip
