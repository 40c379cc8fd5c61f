"""The hub: what huggingface_hub is asked for, and what its answers and errors become."""

import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from tests.support import refuses
from utils.io import hub

TOKEN = "a-token-of-no-known-form"


class Hub:
    """A hub with one repository. files: by name; error: what the next call raises."""

    def __init__(self, cache):
        self.cache, self.files, self.is_offline, self.error = cache, {}, False, None

    def download(self, repository, name, revision, local_files_only):
        if self.error is not None:
            raise self.error
        path = self.cache / repository / revision / name
        if path.is_file():
            return str(path)
        if self.is_offline or local_files_only:
            raise LocalEntryNotFoundError("offline")
        if name not in self.files:
            raise EntryNotFoundError("none")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.files[name])
        return str(path)


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", server.download)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


def test_a_hub_that_refuses_is_named_without_the_token(server):
    server.error = OSError(f"403 Forbidden: no, {TOKEN}")
    with refuses("^hf:me/net@main: 403 Forbidden: ") as refused:
        hub.fetch("hf:me/net@main", ["net.bin"])
    assert TOKEN not in str(refused.value)


def test_a_reference_is_read_from_the_hub_and_then_from_its_cache(server):
    server.files = {"model.safetensors": b"weights", "unet/config.json": b"{}"}
    folder = hub.fetch("hf:me/net@main", ["no.bin", "model.safetensors"], beside=["README.md"])
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert hub.fetch("hf:me/net/unet/config.json@main").read_bytes() == b"{}"
    with refuses(r"^hf:me/net@main has no a\.bin or b\.bin"):
        hub.fetch("hf:me/net@main", ["a.bin", "b.bin"])
    server.is_offline = True
    assert hub.fetch("hf:me/net@main", ["no.bin", "model.safetensors"], beside=["README.md"]) == folder
    with refuses(r"^hf:me/net@main: .*hf download me/net other\.bin --revision main"):
        hub.fetch("hf:me/net@main", ["other.bin"])
    with refuses("hf:OWNER/NAME@REVISION"):
        hub.fetch("hf:me/net", ["other.bin"])


@pytest.mark.parametrize(
    "front, licence",
    [
        ("license: mit", "mit"), ("license: other\nlicense_name: fair-ai", "fair-ai"), ("tags: [a]", None),
        ("license: [mit", None), ("license: [mit]", None),
    ],
)  # fmt: skip
def test_the_licence_stands_in_the_card_of_the_repository(front, licence, server):
    server.files = {"sub/model.safetensors": b"weights", "README.md": f"---\n{front}\n---\n".encode()}
    assert hub.stated_license("hf:me/net/sub/model.safetensors@main") == licence


def test_a_repository_without_a_card_states_no_licence(server):
    assert hub.stated_license("hf:me/net@main") is None
