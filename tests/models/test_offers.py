"""Weights that a command fetches by itself: what may fail of hub, connection and disk costs a line and no time."""

import hashlib
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.torch import save

from models.interop.parity import vary_weights
from models.weights import offers, timm_hub
from tests.support import assert_same_tensors, free_port
from tests.test_weights_commands import RESNET
from utils.io.files import file_lock

COMMIT = "0123456789" * 4
LICENCES = ("apache-2.0", "bsd-3-clause", "mit")  # none that binds what is trained from the weights


class Hub:
    """A server that speaks the hub's protocol: an answer about a file, which redirects to its bytes.

    status, headers: of the answer. sent: the bytes that come; most: after so many the connection breaks; slow: seconds
    between two of 100 pieces. ranges: what was asked for.
    """

    def __init__(self, body):
        self.body = self.sent = body
        self.status, self.most, self.slow, self.knows_ranges = 302, None, 0.0, True
        self.digest = hashlib.sha256(body).hexdigest()
        self.ranges, self.asked, self.is_over = [], 0, Event()

    def answer(self, request):
        self.asked += request.command == "HEAD"
        if self.status is None:
            self.is_over.wait(10)  # no answer
        request.send_response(self.status or 500)
        if self.status == 302:
            headers = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{self.digest}"', "X-Linked-Size": len(self.body)}
            for name, value in {**headers, "Location": self.place}.items():
                request.send_header(name, str(value))
        request.send_header("Content-Length", "0")
        request.end_headers()

    def give(self, request):
        first = 0
        self.ranges.append(request.headers["Range"])
        if self.knows_ranges:
            first = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        request.send_response(206 if self.knows_ranges else 200)
        request.send_header("Content-Length", str(len(self.sent) - first))
        request.end_headers()
        step = len(self.sent) // 100
        for start in range(first, len(self.sent), step):
            if self.is_over.wait(self.slow) or start >= (self.most or len(self.sent)):
                break
            request.wfile.write(self.sent[start : start + step])


@contextmanager
def serving(hub):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            (hub.give if self.path == "/bytes" else hub.answer)(self)

        do_HEAD = do_GET

        def log_message(self, *texts):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    hub.place = f"http://localhost:{server.server_port}/bytes"  # another host, as the hub's
    yield f"http://127.0.0.1:{server.server_port}"
    hub.is_over.set()
    server.shutdown()
    server.server_close()


def use_hub(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def weights():
    return vary_weights(timm.create_model(RESNET.partition(".")[0])).state_dict()


@pytest.fixture
def hub(monkeypatch, tmp_path, weights):
    """A hub that offers the weights of one small network, and an empty cache."""
    close_session()
    row = {"cost": 1.0, "gmacs": 1.0, "megabytes": 1, "licence": LICENCES[0]}
    monkeypatch.setitem(offers.NETWORKS, "weights", {RESNET: row})
    monkeypatch.setattr(offers, "_ANSWER_SEC", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = Hub(save(weights, metadata={"format": "pt"}))
    with serving(hub) as url:
        use_hub(monkeypatch, url)
        yield hub
    close_session()


def parts():
    return list(Path(constants.HF_HUB_CACHE).rglob("blobs/*"))


def obtain(seconds=20.0):
    return offers.list_weights("auto", 1.0, seconds)


def test_weights_are_fetched_once_and_then_load_without_the_hub(hub, weights, log):
    for pretrained, cost in (("cached", 1.0), ("never", 1.0), ("auto", 0.9)):
        assert offers.list_weights(pretrained, cost, 20.0) == []
    assert hub.asked == 0
    assert obtain() == [RESNET]
    for word in (RESNET, "1 MB", timm.get_pretrained_cfg(RESNET).license, constants.ENDPOINT):
        assert word in log.text
    assert timm_hub.cached_names() == [RESNET] and parts() == []
    asked = hub.asked
    assert obtain() == [RESNET]
    assert_same_tensors(timm_hub.load_timm(RESNET).state_dict(), weights)
    assert hub.asked == asked
    assert offers.list_weights("never", 1.0, 20.0) == []


@pytest.mark.parametrize("most_cost, seconds, sizes", [(9, 120, [62]), (99, 6, [62]), (36, 120, [346, 354, 372])])
def test_the_largest_networks_that_come_in_time_are_fetched_and_those_like_them(monkeypatch, most_cost, seconds, sizes):
    fetched = []
    monkeypatch.setattr(offers, "_fetch", lambda name, row, seconds: fetched.append(row["megabytes"]))
    offers.list_weights("auto", most_cost, seconds)
    assert sorted(fetched) == sizes


WAYS = {  # and a word of the line that the user reads
    "offline": "offline",
    "refused": "refused",
    "silent": "no answer",
    "portal": "SHA-256",
    404: "404",
    429: "429",
    503: "503",
}


def break_hub(hub, way, monkeypatch):
    if way == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif way == "refused":
        use_hub(monkeypatch, f"http://127.0.0.1:{free_port()}")
    else:
        hub.status = {"silent": None, "portal": 200}.get(way, way)


@pytest.mark.parametrize("way", WAYS)
def test_a_hub_that_does_not_answer_costs_a_line(hub, log, monkeypatch, way):
    break_hub(hub, way, monkeypatch)
    assert obtain() == []
    lines = [record.getMessage() for record in log.records if record.levelname == "WARNING"]
    assert len(lines) == 1 and RESNET in lines[0] and WAYS[way] in lines[0] and "\n" not in lines[0]
    assert timm_hub.cached_names() == [] and parts() == []


def test_what_came_is_kept_and_the_next_run_fetches_the_rest(hub, log):
    hub.most = len(hub.body) // 2
    assert obtain() == []  # the connection breaks
    (part,) = parts()
    with file_lock(part.with_suffix(".lock"), ""):
        assert obtain() == [] and "another process" in log.text
    part.with_suffix(".lock").touch()  # of a killed process
    came = part.stat().st_size
    assert 0 < came < len(hub.body)
    hub.most, hub.slow = None, 0.02
    assert obtain(seconds=0.2) == []  # the time is over
    assert "next run" in log.text
    hub.slow = 0.0
    time.sleep(0.2)
    more = part.stat().st_size
    assert obtain() == [RESNET]
    assert hub.ranges == ["bytes=0-", f"bytes={came}-", f"bytes={more}-"] and came < more


def test_a_server_without_ranges_begins_again(hub):
    hub.most = len(hub.body) // 2
    assert obtain() == []
    hub.most, hub.knows_ranges = None, False
    assert obtain() == [RESNET]


@pytest.mark.parametrize("change", [lambda body: body[:-1] + b"!", lambda body: body + b"?"])
def test_bytes_of_another_file_are_removed(hub, log, change):
    hub.sent = change(hub.body)
    assert obtain() == [] and "SHA-256" in log.text and parts() == []


def test_a_full_disk_is_left_as_it_was(hub, log, small_disk, monkeypatch):
    hub.body = hub.sent = bytes(2 << 20)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(small_disk))
    assert obtain() == [] and "No space left" in log.text and parts() == []


def test_networks_are_free_to_use_and_take_the_sizes_that_a_plan_chooses():
    rows = offers.NETWORKS["weights"]
    assert [*rows] == sorted(rows, key=lambda name: rows[name]["cost"])
    for name, row in rows.items():
        stated = timm.get_pretrained_cfg(name)
        assert stated.license == row["licence"].lower() in LICENCES and stated.hf_hub_id == f"timm/{name}"
        assert stated.fixed_input_size == ("build" in row)
        with torch.device("meta"):
            tensors = timm.create_model(name).state_dict().values()
        assert sum(tensor.numel() for tensor in tensors) * 4e-6 == pytest.approx(row["megabytes"], abs=0.6)
