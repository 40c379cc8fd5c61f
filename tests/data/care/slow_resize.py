"""job=downsample: an image of 30,000 x 30,000 pixels within 512 MiB."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.data.care.test_resize import copy_of, shrink
from tests.support import ROOT


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_of_900_million_pixels_within_512_mib(suffix, tmp_path):
    vips = pytest.importorskip("pyvips")
    file = tmp_path / f"huge.{suffix}"
    board = vips.Image.black(30_000, 30_000).bandjoin([vips.Image.black(30_000, 30_000) + 200, 100]).cast("uchar")
    board.copy(interpretation="srgb").write_to_file(str(file))
    code = (
        f"import sys; sys.path[0] = {str(ROOT / 'data/care')!r}; import strips\n"
        f"print(strips.shrink({str(file)!r}, {str(file)!r} + '.small', 2048, 95))\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    fault, peak_kib = said.split()  # ru_maxrss would count the parent's before exec
    assert fault == "None" and int(peak_kib) < 512 * 1024, said
    assert shrink(file, 2048) is None and copy_of(file).read_bytes() == Path(f"{file}.small").read_bytes()
    with Image.open(copy_of(file)) as image:
        assert image.size == (2048, 2048) and image.getpixel((1000, 1000)) == pytest.approx((0, 200, 100), abs=3)
