"""The collections that the page knows, and the route of their images."""

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from tests.utils.record.test_run_index import make_run
from tests.viewer.conftest import add_data, save_grey
from utils.record.run_index import RunIndex
from viewer import images


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A run, and its collection: a wide image, a broken one, one whose file vanishes, a link out of the collection."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos/a.png", "photos/b.png", "photos/c.jpg", "secret.png"):
        save_grey(tmp_path / name, size=(400, 100))
    (tmp_path / "photos/b.png").write_bytes(b"<script>")
    (tmp_path / "photos/d.png").symlink_to(tmp_path / "secret.png")
    add_data(make_run(tmp_path / "runs/a"), root="photos")
    return images.Shelf(RunIndex([tmp_path / "runs"]), None)


def test_images_are_reduced_kept_and_never_from_outside(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "app", app := FastAPI())
    images.add_route(shelf)
    client, (name,) = TestClient(app), shelf.of_runs().values()
    collection = shelf.open(name)
    (tmp_path / "photos/c.jpg").unlink()
    answers = [client.get(images.image_address(name, collection, row, px=64)) for row in range(4)]
    kinds = [answer.headers["content-type"] for answer in answers]
    assert kinds == ["image/jpeg"] + 3 * ["image/svg+xml"] and all(answer.status_code == 200 for answer in answers)
    (tmp_path / "thumbnail").write_bytes(answers[0].content)
    assert Image.open(tmp_path / "thumbnail").size == (64, 16)
    for path in (
        f"/image/{name}/x/0",
        f"/image/{name}/{collection.fingerprint}/4",
        f"/image/x/{collection.fingerprint}/0",
    ):
        assert client.get(path).status_code == 404
    assert images.rows_of_paths(collection, ["c.jpg", "x"]).tolist() == [2, -1]
