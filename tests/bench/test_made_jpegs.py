"""The images of the loader bench: as large as they are said to be, and the same each time."""

import sys

from PIL import Image

from bench import made_jpegs


def test_images_are_large_and_the_same_again(tmp_path, monkeypatch, capsys):
    for name in ("first", "second"):
        monkeypatch.setattr(sys, "argv", ["made_jpegs.py", str(tmp_path / name), "count=2"])
        made_jpegs.main()
    assert capsys.readouterr().out.splitlines()[0] == f"2 images in {tmp_path}/first"
    files = sorted(path.relative_to(tmp_path / "first").as_posix() for path in (tmp_path / "first").rglob("*.jpg"))
    assert files == ["class_0/00000.jpg", "class_1/00001.jpg"]
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
        with Image.open(tmp_path / "first" / file) as image:
            assert 1.0e6 <= image.width * image.height <= 2.56e6 and image.mode == "RGB"
