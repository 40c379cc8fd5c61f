"""Weight files: round trips with metadata, refusals by name of the file; nothing is ever unpickled."""

import io
import json
import os
import pickle
import random

import pytest
import torch
from safetensors.torch import save_file

from tests.support import refuses
from utils.errors import UserError
from utils.io.weight_files import choose_weights, find_weights
from utils.io.weights import read_header, read_weights, write_weights

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1, 2], dtype=torch.int64)}


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def equal(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def message_of(path):
    with pytest.raises(UserError) as refused:
        read_weights(path)
    assert str(refused.value).startswith(f"{path} ") and "\n" not in str(refused.value)
    return str(refused.value)


def test_tensors_metadata_and_shapes_round_trip(tmp_path, monkeypatch):
    metadata, path = {"step": 3, "class_names": ["é", "b"], "model": {"dims": [1, 2]}}, tmp_path / "w.safetensors"
    base = torch.arange(12.0)
    tensors = {**TENSORS, "whole": base, "tied": base, "part": base[3:5], "turned": base.reshape(3, 4).t()}
    write_weights(path, tensors, metadata)
    found, said = read_weights(path)
    assert equal(found, tensors) and said == metadata | {"weights_hash": said["weights_hash"]}
    assert os.listdir(tmp_path) == ["w.safetensors"]
    assert json.loads(read_header(path)[1]["atelier"]) == metadata  # that others can read
    monkeypatch.setattr("utils.io.weights.load_file", lambda path: pytest.fail("the tensors were read"))
    shapes, said = read_weights(path, shapes_only=True)
    assert said.keys() == {*metadata, "weights_hash"}
    assert shapes["a.weight"].is_meta and shapes["a.weight"].shape == (2, 3)


def test_tensors_that_do_not_match_their_checksum_are_refused(tmp_path):
    """As after a copy that went wrong. A file that others wrote has none."""
    path = tmp_path / "w.safetensors"
    write_weights(path, TENSORS, {})
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "damaged" in message_of(path) and "earlier checkpoint" not in message_of(path)
    header = read_header(path)[1]
    converted = {name: tensor.half() for name, tensor in TENSORS.items()}
    save_file(converted, path, metadata=header)
    found, said = read_weights(path)
    assert equal(found, converted) and "weights_hash" not in said
    save_file(TENSORS, path, metadata={"format": "pt"})
    found, said = read_weights(path)
    assert equal(found, TENSORS) and said == {}
    for metadata in ("[1]", "{broken"):
        save_file(TENSORS, path, metadata={"atelier": metadata})
        message_of(path)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_pickled_objects_are_refused_and_not_run(tmp_path, name):
    path = tmp_path / name
    torch.save({"model": TENSORS, "args": Bomb(tmp_path / "bomb")}, path)
    message = message_of(path)
    assert name == "w.safetensors" or ("posix.mkdir" in message and "weights_only" not in message)
    for protocol in (0, 2, 5):
        path.write_bytes(pickle.dumps(Bomb(tmp_path / "bomb"), protocol=protocol))
        message_of(path)
    assert not (tmp_path / "bomb").exists()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_tensors_of_more_elements_than_are_stored_are_refused(tmp_path):
    path, buffer = tmp_path / "w.pt", io.BytesIO()
    for tensor in (torch.zeros(1).expand(10**12), torch.eye(3).to_sparse(), torch.empty(10**12, device="meta")):
        torch.save({"a": tensor}, path)
        assert "no state dict of plain tensors" in message_of(path)
    torch.save({"a": torch.zeros(7)}, buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(buffer.getvalue().replace(b"K\x07", b"J\x00\x00\x00\x40"))  # 2**30 numbers
    message_of(path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_truncated_or_foreign_file_is_refused(tmp_path, name):
    path = tmp_path / name
    message_of(path)  # a missing file
    torch.save(TENSORS, path) if name == "w.pt" else save_file(TENSORS, path)
    content = path.read_bytes()
    for kept in (0, 1, 7, 40, len(content) - 1):
        path.write_bytes(content[:kept])
        message_of(path)
    path.write_bytes(bytes(range(256)))
    message_of(path)


def test_a_damaged_file_is_refused_or_read_but_never_a_traceback(tmp_path):
    """torch's reader raises whatever the bytes bring it to: KeyError, IndexError, struct.error and more."""
    draws, buffer = random.Random(0), io.BytesIO()
    torch.save(TENSORS, buffer, _use_new_zipfile_serialization=False)
    refused = 0
    for _ in range(100):
        content = bytearray(buffer.getvalue())
        for _ in range(3):
            content[draws.randrange(len(content))] = draws.randrange(256)
        (tmp_path / "w.pt").write_bytes(content)
        try:
            read_weights(tmp_path / "w.pt")
        except UserError:
            refused += 1
    assert refused > 10


def test_a_file_without_a_state_dict_is_refused(tmp_path):
    for content in ([1, 2], torch.ones(2), {"epoch": 3}, {3: torch.ones(2)}, {}):
        torch.save(content, tmp_path / "w.pt")
        assert "no state dict of plain tensors" in message_of(tmp_path / "w.pt")


def test_a_forged_header_is_refused_by_name(tmp_path):
    path, entry = tmp_path / "w.safetensors", {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    for text in (json.dumps({"a\nERROR forged": {}}), json.dumps({"a": entry}), "[" * 1000):
        path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(8))
        message_of(path)


def test_a_run_s_weights_are_found_by_name(tmp_path):
    with refuses("is no run folder and has no model.safetensors"):
        find_weights(str(tmp_path), "best")
    write_weights(tmp_path / "weights/best_weights.safetensors", TENSORS, {})
    write_weights(tmp_path / "weights/last_weights.safetensors", TENSORS, {})
    assert choose_weights(str(tmp_path), "last") == tmp_path / "weights/last_weights.safetensors"
    assert choose_weights("nowhere near", str(tmp_path)) == tmp_path / "weights/best_weights.safetensors"
    assert find_weights(str(tmp_path / "weights/best_weights.safetensors"), "last").name.startswith("best")
    with refuses("has no ema weights; it has best, last$"):
        find_weights(str(tmp_path), "ema")


def test_of_a_published_tagger_predictions_take_the_onnx_file_and_training_the_other(tmp_path):
    for name in ("model.onnx", "model.safetensors"):
        (tmp_path / name).touch()
    assert find_weights(str(tmp_path), "best").suffix == ".safetensors"
    assert find_weights(str(tmp_path), "best", onnx_first=True).suffix == ".onnx"


def test_weights_have_the_mode_that_umask_gives_and_float8_its_values(tmp_path):
    before = os.umask(0o022)
    try:
        write_weights(path := tmp_path / "w.safetensors", {"a": torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn)}, {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    assert read_weights(path)[0]["a"].tolist() == [1.5, -2.0]
    save_file({"a": torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, path)
    message_of(path)
