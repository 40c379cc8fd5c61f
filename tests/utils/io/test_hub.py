"""The hub: what huggingface_hub is asked for, and what its answers and errors become."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session

from tests.support import refuses
from utils.io import hub
from utils.io.safe_text import hide_secrets

TOKEN = "a-token-of-no-known-form"
COMMIT = "1234567890" * 4


class Hub:
    """A hub with one repository. files: by name; error: what the next call raises."""

    def __init__(self, cache):
        self.cache, self.files, self.private, self.is_offline, self.error = cache, {}, True, False, None

    def create_repo(self, name, private, exist_ok):
        assert exist_ok and name == "me/net"

    def repo_info(self, name):
        return SimpleNamespace(private=self.private)

    def create_commit(self, name, additions, commit_message):
        if self.error is not None:
            raise self.error
        self.files = {each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in additions}
        return SimpleNamespace(oid=COMMIT)

    def download(self, repository, name, revision, local_files_only):
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
    for name in ("create_repo", "repo_info", "create_commit"):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{name}", getattr(server, name))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", server.download)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


@pytest.fixture
def files(tmp_path):
    (tmp_path / "net.bin").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    return {"net.bin": tmp_path / "net.bin", "inner/README.md": tmp_path / "README.md"}


def test_an_upload_is_one_commit(server, files):
    assert hub.upload(files, "me/net", private=True) == COMMIT
    assert server.files == {name: path.read_bytes() for name, path in files.items()}
    assert get_session().timeout.read == 60  # then huggingface_hub tries again
    assert COMMIT in hide_secrets(f"commit {COMMIT}") and COMMIT in hide_secrets(f"hf:me/net@{COMMIT}")


def test_a_hub_that_refuses_is_named_without_the_token(server, files):
    server.error = OSError(f"403 Forbidden: no, {TOKEN}")
    with refuses("^hub: me/net: 403 Forbidden: .*the same command continues") as refused:
        hub.upload(files, "me/net", private=True)
    assert TOKEN not in str(refused.value)


def test_a_private_upload_into_a_public_repository_is_refused(server, files):
    server.private = False
    with refuses(r"^hub\.private: "):
        hub.upload(files, "me/net", private=True)
    assert not server.files


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
    ("front", "licence"),
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
