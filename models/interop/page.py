"""One HTML file that runs a network in a browser, without a server or the network: page.html, filled.

ONNX Runtime for browsers (onnxruntime-web, MIT licence) is fetched once into outputs/cache, and compared by hash.
"""

import gzip
import html
import json
import re
from base64 import b64encode
from pathlib import Path

import torch

from models.predictor import onnx_predictor
from utils.errors import UserError
from utils.io.files import sha256_file
from utils.io.memo import OURS, own_cache

PACKAGE = "onnxruntime-web@1.30.0"  # of npm
HASHES = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
_URL = f"https://cdn.jsdelivr.net/npm/{PACKAGE}/dist/"


def fill_page(path: Path, network: Path, title: str) -> None:
    """Write the page of an ONNX file of ours. Raises UserError (`format`) if no page can do what training did."""
    metadata = onnx_predictor(network, torch.device("cpu")).metadata
    if metadata["preprocessing"].get("background") == "drop":
        raise UserError("format: a browser cannot drop transparency (data.background=drop); set format=onnx")
    code, wasm = map(_read_runtime, HASHES)
    parts = {
        "TITLE": html.escape(title),
        "FACTS": json.dumps(metadata).replace("<", "\\u003c"),  # a name may end the element
        "CODE": _pack(code),
        "WASM": _pack(wasm),
        "NETWORK": _pack(network.read_bytes()),
    }
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    path.write_text(re.sub("@([A-Z]+)@", lambda place: parts[place[1]], template), encoding="utf-8")


def _pack(content: bytes) -> str:
    return b64encode(gzip.compress(content, compresslevel=6, mtime=0)).decode()


def _read_runtime(name: str) -> bytes:
    """Return a file of ONNX Runtime for browsers; fetch it if the cache lacks it. Raises UserError (`format`)."""
    path = own_cache(OURS / PACKAGE / name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(_URL + name, str(path))
        except OSError as error:
            raise UserError(
                f"format: page needs {_URL}{name}, but {error}; without a network, put this file of package/dist/ in "
                f"what `npm pack {PACKAGE}` writes into {path.parent}"
            ) from None
    if sha256_file(path) != HASHES[name]:
        raise UserError(f"format: page needs {_URL}{name}, but {path} is another file; remove it, and try again")
    return path.read_bytes()
