"""The hub, against a server on this machine that also stalls, fails, refuses, and cuts uploads."""

import hashlib
import json
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from tests.support import refuses
from utils.errors import UserError
from utils.io import hub
from utils.io.safe_text import hide_secrets

TOKEN = "a-token-of-no-known-form"
COMMIT = "1234567890" * 4


class Hub(ThreadingHTTPServer):
    """What the hub keeps: files stored by hash, and the files of commits. `faults` happen to the next requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.stored, self.commits, self.puts, self.faults, self.private = {}, [], 0, {}, True
        self.stop = threading.Event()

    @property
    def files(self):
        return {name: content for commit in self.commits for name, content in commit.items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value, status=200, headers=()):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content)

    def fault(self, kind):
        """Return whether a fault is due for a kind of request, after it has happened."""
        due = self.server.faults.get(kind, [])
        fault = due.pop(0) if due else None
        if fault == "stall":
            self.server.stop.wait(20)
        if fault in ("stall", "cut"):
            self.close_connection = True
        elif fault:
            self.answer({"error": f"no: {self.headers.get('Authorization')}"}, fault)
        return bool(fault)

    def do_PUT(self):
        self.server.puts += 1
        length = int(self.headers["Content-Length"])
        is_cut = (self.server.faults.get("put") or [None])[0] == "cut"
        content = self.rfile.read(length // 2 if is_cut else length)
        if not self.fault("put"):
            self.server.stored[self.path.rpartition("/")[2]] = content
            self.answer({})

    def do_POST(self):
        text, host = self.rfile.read(int(self.headers.get("Content-Length", 0))), self.headers["Host"]
        kind = self.path.split("/")[-2 if "models" in self.path else -1]
        if self.fault(kind):
            return
        if kind == "create":
            self.answer({"url": f"http://{host}/me/net"})
        elif kind == "validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif kind == "preupload":
            names = [file["path"] for file in json.loads(text)["files"]]
            modes = {name: "lfs" if name.endswith(".bin") else "regular" for name in names}
            self.answer({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        elif kind == "batch":
            objects = json.loads(text)["objects"]
            for entry in objects:
                if entry["oid"] not in self.server.stored:
                    entry["actions"] = {"upload": {"href": f"http://{host}/put/{entry['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects})
        else:
            lines = [json.loads(line) for line in text.splitlines()]
            values = {line["value"]["path"]: line["value"] for line in lines if line["key"] != "header"}
            self.server.commits.append({
                name: self.server.stored[value["oid"]] if "oid" in value else b64decode(value["content"])
                for name, value in values.items()
            })  # fmt: skip
            self.answer({"commitUrl": f"http://{host}/me/net/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    def do_GET(self):
        name = self.path.partition("/resolve/")[2].partition("/")[2]
        if self.path.startswith("/api/"):
            self.answer({"id": "me/net", "private": self.server.private, "sha": COMMIT, "siblings": []})
        elif name in self.server.files:
            content = self.server.files[name]
            tag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.answer(content, headers=tag)
        else:
            self.answer({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    for name, value in {
        "ENDPOINT": url,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between tries
    monkeypatch.setattr(hub, "_STALLED_SEC", 1.0)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.stop.set()
    server.shutdown()


@pytest.fixture
def files(tmp_path):
    (tmp_path / "net.bin").write_bytes(bytes(range(256)) * 4096)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    return {"net.bin": tmp_path / "net.bin", "inner/README.md": tmp_path / "README.md"}


def test_an_upload_that_is_cut_stalls_and_fails_ends_as_one_commit(server, files):
    server.faults = {"put": ["cut", "stall", 503]}
    assert hub.upload(files, "me/net", private=True) == COMMIT
    assert server.commits == [{name: path.read_bytes() for name, path in files.items()}] and server.puts == 4
    assert COMMIT in hide_secrets(f"commit {COMMIT}") and COMMIT in hide_secrets(f"hf:me/net@{COMMIT}")


def test_an_upload_that_is_typed_again_sends_no_file_twice(server, files):
    server.faults = {"commit": [500] * 9}
    with refuses("^hub: me/net: .*the same command continues"):
        hub.upload(files, "me/net", private=True)
    assert not server.commits
    server.faults = {}
    hub.upload(files, "me/net", private=True)
    assert server.puts == 1 and len(server.commits) == 1


@pytest.mark.parametrize(("kind", "status"), [("commit", 403), ("put", 507)])
def test_a_hub_that_refuses_or_is_full_is_named_without_the_token(kind, status, server, files):
    server.faults = {kind: [status] * 9}
    with pytest.raises(UserError, match="^hub: me/net: ") as caught:
        hub.upload(files, "me/net", private=True)
    assert TOKEN not in str(caught.value) and not server.commits


def test_a_private_upload_into_a_public_repository_is_refused(server, files):
    server.private = False
    with refuses(r"^hub\.private: "):
        hub.upload(files, "me/net", private=True)
    assert not server.puts


def test_a_reference_is_read_from_the_hub_and_then_from_its_cache(server, monkeypatch):
    server.commits = [{"model.safetensors": b"weights", "unet/config.json": b"{}"}]
    folder = hub.fetch("hf:me/net@main", ["no.bin", "model.safetensors"], beside=["README.md"])
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert hub.fetch("hf:me/net/unet/config.json@main").read_bytes() == b"{}"
    with refuses(r"^hf:me/net@main has no a\.bin or b\.bin"):
        hub.fetch("hf:me/net@main", ["a.bin", "b.bin"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch("hf:me/net@main", ["no.bin", "model.safetensors"], beside=["README.md"]) == folder
    with refuses(r"^hf:me/net@main: .*hf download me/net other\.bin --revision main"):
        hub.fetch("hf:me/net@main", ["other.bin"])
    with refuses("hf:OWNER/NAME@REVISION"):
        hub.fetch("hf:me/net", ["other.bin"])


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: mit", "mit"), ("license: other\nlicense_name: fair-ai", "fair-ai"), ("tags: [a]", None),
        ("license: [mit", None), ("license: [mit]", None),
    ],
)  # fmt: skip
def test_the_licence_stands_in_the_card_of_the_repository(front, licence, server):
    server.commits = [{"sub/model.safetensors": b"weights", "README.md": f"---\n{front}\n---\n".encode()}]
    assert hub.stated_license("hf:me/net/sub/model.safetensors@main") == licence
    server.commits = [{"a": b""}]
    assert hub.stated_license("hf:me/net@main") is None
