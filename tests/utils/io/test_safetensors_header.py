"""A header that lies is refused before anything is allocated; one that does not is read as safetensors reads it."""

import json
import random
import re

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from tests.support import no_large_allocation
from utils.errors import UserError
from utils.io.untrusted.safetensors_header import MAX_HEADER_BYTES, read_header
from utils.io.weights import read_weights

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def forge(header, data=8, length=None):
    """Return a file's bytes: a header (JSON, or bytes as they are), its length or what is said of it, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def changed(**values):
    return forge({"a": {**ONE, **values}})


FORGED = {
    "huge shape": (changed(shape=[2**40, 2**20]), "'a' of shape [1099511627776, 1048576] and dtype F32 takes"),
    "shape beyond 64 bits": (changed(shape=[2**62] * 60), "bytes and more, but is given 8"),
    "huge shape with offsets": (
        changed(shape=[2**40], data_offsets=[0, 2**42]), "'a' claims to end at byte 4,398,046,511,104 of 8"
    ),
    "negative shape": (changed(shape=[-2]), "'a' has shape [-2]; up to 64 whole numbers from 0 up are allowed"),
    "two negative sides": (changed(shape=[-1, -2]), "'a' has shape [-1, -2]"),
    "shape with a fraction": (changed(shape=[2.0]), "'a' has shape [2.0]"),
    "shape with true": (changed(shape=[True, 2]), "'a' has shape [True, 2]"),
    "shape of text": (changed(shape="2"), "'a' has shape '2'"),
    "too many axes": (changed(shape=[1] * 70 + [2]), "up to 64 whole numbers"),
    "wrong size": (changed(shape=[3]), "'a' of shape [3] and dtype F32 takes 12 bytes, but is given 8"),
    "wrong dtype size": (changed(dtype="F16"), "of shape [2] and dtype F16 takes 4 bytes, but is given 8"),
    "unknown dtype": (changed(dtype="F128"), "'a' has dtype 'F128'; known are F64 F32"),
    "NaN dtype": (forge(b'{"a":{"dtype":NaN,"shape":[2],"data_offsets":[0,8]}}'), "holds NaN, which is not JSON"),
    "dtype of a list": (changed(dtype=["F32"]), "'a' has dtype ['F32']"),
    "overlapping": (
        forge({"a": ONE, "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}),
        "'b' begins at byte 4, within the tensor before it",
    ),
    "one place for two": (forge({"a": ONE, "b": ONE}), "'b' begins at byte 0, within the tensor before it"),
    "hole": (forge({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}), "'a' begins at byte 4, after a gap"),
    "bytes left over": (forge({"a": ONE}, data=9), "its tensors take 8 bytes, the file holds 9"),
    "offset beyond the end": (forge({"a": ONE}, data=7), "'a' claims to end at byte 8 of 7"),
    "descending offsets": (changed(data_offsets=[8, 0]), "'a' has data_offsets [8, 0]; two ascending whole numbers"),
    "negative offsets": (changed(data_offsets=[-8, 0]), "'a' has data_offsets [-8, 0]"),
    "three offsets": (changed(data_offsets=[0, 4, 8]), "'a' has data_offsets [0, 4, 8]"),
    "no offsets": (forge({"a": {"dtype": "F32", "shape": [2]}}), "'a' is not an object of dtype"),
    "another key": (changed(order="F"), "'a' is not an object of dtype"),
    "duplicate name": (
        forge(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}'),
        "its header names 'a' twice",
    ),
    "duplicate key": (
        forge(b'{"a":{"dtype":"F32","dtype":"I64","shape":[2],"data_offsets":[0,8]}}'), "names 'dtype' twice"
    ),
    "truncated header": (forge({"a": ONE}, data=0)[:30], "it says that its header has"),
    "truncated length": (b"\1\0\0", "it has 3 bytes, too few for a header's length"),
    "empty": (b"", "it has 0 bytes"),
    "length 2**60": (forge({"a": ONE}, length=2**60), "its header has 1,152,921,504,606,846,976 bytes, the file has"),
    "length 2**64 - 1": (forge({"a": ONE}, length=2**64 - 1), "its header has 18,446,744,073,709,551,615 bytes"),
    "no JSON": (forge(b"\x93NUMPY\x01\x00"), "its header is not JSON"),
    "no text": (forge(b"\xff\xfe{}"), "its header is not JSON"),
    "nested too deeply": (forge(b"[" * 200_000), "its header is not JSON"),
    "a long number": (forge(b'{"a":' + b"9" * 10_000 + b"}"), "its header is not JSON"),
    "a list": (forge([ONE]), "its header is a JSON list, no object"),
    "metadata of numbers": (forge({"__metadata__": {"a": 1}, "a": ONE}), "its __metadata__ is not a flat object"),
    "nested metadata": (forge({"__metadata__": {"a": {}}, "a": ONE}), "its __metadata__ is not a flat object"),
    "a name that forges lines": (
        forge({"a\nERROR forged\x1b[2J\u202e": {}}), r"'a\nERROR forged\x1b[2J\u202e' is not an object"
    ),
    "a name without end": (forge({"a" * 5000: {}}), f"'{'a' * 79}... is not an object"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_file_is_refused_with_its_fault(name, tmp_path):
    content, lie = FORGED[name]
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    for read in (read_header, read_weights):
        with pytest.raises(UserError) as refused:
            read(path, "init_from")
        message = str(refused.value)
        assert message.startswith(f"init_from: {path} is not a readable safetensors file (") and lie in message, message
        assert "\n" not in message and "\x1b" not in message and len(message) < len(str(path)) + 600


def test_a_long_header_is_refused_unread(tmp_path):
    path = tmp_path / "w.safetensors"
    with open(path, "wb") as stream:
        stream.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        stream.truncate(MAX_HEADER_BYTES + 100)  # a hole, which takes no place on the disk
    with pytest.raises(UserError, match="its header has 16,777,217 bytes, more than the 16,777,216 allowed"):
        read_header(path, "init_from")


@pytest.mark.parametrize("name", [name for name in FORGED if name.startswith(("huge", "shape beyond", "length 2**"))])
def test_a_file_that_promises_terabytes_takes_no_memory(name, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(FORGED[name][0])
    with no_large_allocation(), pytest.raises(UserError, match=re.escape(FORGED[name][1])):
        read_weights(path, "init_from")


def test_a_header_that_is_true_describes_the_tensors(tmp_path):
    tensors = {
        "ä": torch.ones(2, 3), "half": torch.ones(4, dtype=torch.bfloat16), "none": torch.ones(0, 5),
        "one": torch.tensor(3), "flags": torch.ones(3, dtype=torch.bool),
        "bytes": torch.ones(2, 1, 2, dtype=torch.uint8), "complex": torch.ones(2, dtype=torch.complex64),
        "tiny": torch.ones(3).to(torch.float8_e4m3fn),
    }  # fmt: skip
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "w.safetensors", "x")
    assert header.metadata == {"format": "pt"} and header.tensors.keys() == tensors.keys()
    for name, tensor in header.tensors.items():
        assert tensor.is_meta and (tensor.shape, tensor.dtype) == (tensors[name].shape, tensors[name].dtype), name


def test_a_file_without_tensors_is_whole(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(save({}))
    assert read_header(tmp_path / "w.safetensors", "x") == ({}, {})


def test_accepted_files_are_read_by_safetensors(tmp_path):
    """600 files with random damage to the header: refused by name of the file, or read by safetensors itself."""
    draws, path = random.Random(0), tmp_path / "w.safetensors"
    whole = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}, metadata={"x": "y"})
    length, passed = int.from_bytes(whole[:8], "little"), 0
    for _ in range(600):
        content = bytearray(whole)
        for _ in range(draws.choice((1, 1, 2, 4))):
            content[draws.randrange(8 + length)] = draws.choice(b'0123456789-{}[]:,".EFIx\0\xff')
        path.write_bytes(content)
        try:
            header = read_header(path, "x")
        except UserError as error:
            assert str(error).startswith(f"x: {path} is not a readable safetensors file (")
            continue
        passed += 1
        found = load_file(path)
        assert {name: tensor.shape for name, tensor in found.items()} == {
            name: tensor.shape for name, tensor in header.tensors.items()
        }
    assert 6 < passed < 300


def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match=r"^init_from: .* cannot be read \(Is a directory\)$"):
        read_header(tmp_path, "init_from")
