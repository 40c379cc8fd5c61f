"""Weight files. Round trips with metadata; refusals by name of the file; nothing is ever unpickled."""

import io
import json
import os
import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from utils.errors import UserError
from utils.io.weights import choose_weights, find_weights, read_header, read_weights, write_weights

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1, 2], dtype=torch.int64)}


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def equal(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def message_of(path, key="init_from"):
    with pytest.raises(UserError) as refused:
        read_weights(path, key)
    return str(refused.value)


def test_tensors_and_metadata_round_trip(tmp_path):
    metadata = {"step": 3, "class_names": ["é", "b"], "model": {"dims": [1, 2]}}
    write_weights(tmp_path / "w.safetensors", TENSORS, metadata)
    found, said = read_weights(tmp_path / "w.safetensors", "init_from")
    assert equal(found, TENSORS) and said == metadata
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_tensors_that_do_not_match_their_checksum_are_refused(tmp_path):
    """As after a copy that went wrong. A file that others wrote has none."""
    path = tmp_path / "w.safetensors"
    write_weights(path, TENSORS, {})
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert message_of(path).startswith(f"init_from: {path} is damaged: ")
    path.write_bytes(content.replace(b"atelier_sha256", b"another_sha256"))
    assert equal(read_weights(path, "x")[0], TENSORS)


def test_tensors_that_share_memory_or_are_views_are_written_as_they_look(tmp_path):
    base = torch.arange(12.0)
    views = {"whole": base, "tied": base, "part": base[3:5], "turned": base.reshape(3, 4).t()}
    write_weights(tmp_path / "w.safetensors", views, {})
    assert equal(read_weights(tmp_path / "w.safetensors", "x")[0], views)


def test_a_foreign_safetensors_file_has_no_metadata(tmp_path):
    save_file(TENSORS, tmp_path / "w.safetensors", metadata={"format": "pt"})
    found, said = read_weights(tmp_path / "w.safetensors", "init_from")
    assert equal(found, TENSORS) and said == {}


@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize(
    "wrap", [dict, lambda state: {"model": state, "epoch": 3}, lambda state: {"state_dict": state}]
)
def test_a_torch_file_is_read_bare_or_wrapped(tmp_path, ending, wrap):
    torch.save(wrap(TENSORS), tmp_path / f"w{ending}")
    found, said = read_weights(tmp_path / f"w{ending}", "init_from")
    entries = [name for name in wrap(TENSORS) if name not in TENSORS]
    assert equal(found, TENSORS) and said == ({"entries": entries} if entries else {})


def test_a_missing_file(tmp_path):
    path = tmp_path / "w.safetensors"
    assert message_of(path) == f"init_from: {path} does not exist; name a run folder or a weight file"
    assert message_of(tmp_path, "weights").startswith(f"weights: {tmp_path} does not exist")


def test_pickled_objects_are_refused_and_not_run(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": TENSORS, "args": Bomb(tmp_path / "bomb")}, path)
    message = message_of(path)
    assert message.startswith(f"init_from: {path} ") and "posix.mkdir" in message and "weights_only" not in message
    assert not (tmp_path / "bomb").exists()


def test_a_bare_pickle_that_promises_more_than_it_holds_is_refused(tmp_path):
    buffer, path = io.BytesIO(), tmp_path / "w.pt"
    torch.save({"a": torch.zeros(7)}, buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(buffer.getvalue().replace(b"K\x07", b"J\x00\x00\x00\x40"))  # 2**30 numbers
    assert "storage has wrong byte size" in message_of(path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "tensor", [torch.zeros(1).expand(10**12), torch.eye(3).to_sparse(), torch.empty(10**12, device="meta")]
)
def test_tensors_of_more_elements_than_are_stored_are_refused(tensor, tmp_path):
    torch.save({"a": tensor}, tmp_path / "w.pt")
    assert "no state dict of plain tensors" in message_of(tmp_path / "w.pt")


@pytest.mark.parametrize("metadata", ["[1]", "{broken"])
def test_metadata_that_are_no_object_are_refused(metadata, tmp_path):
    save_file(TENSORS, tmp_path / "w.safetensors", metadata={"atelier": metadata})
    assert message_of(tmp_path / "w.safetensors").startswith(f"init_from: {tmp_path}/w.safetensors is not a readable")


def test_shapes_are_read_without_the_tensors(tmp_path, monkeypatch):
    write_weights(tmp_path / "w.safetensors", TENSORS, {"step": 3})
    monkeypatch.setattr("utils.io.weights.load_file", lambda path: pytest.fail("the tensors were read"))
    shapes, metadata = read_weights(tmp_path / "w.safetensors", "init_from", shapes_only=True)
    assert {name: (tuple(tensor.shape), tensor.is_meta) for name, tensor in shapes.items()} == {
        "a.weight": ((2, 3), True), "a.bias": ((2,), True),
    }  # fmt: skip
    assert metadata == {"step": 3}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_plain_pickle_is_refused_and_not_run(tmp_path, protocol):
    path = tmp_path / "w.pt"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "bomb"), protocol=protocol))
    assert message_of(path).startswith(f"init_from: {path} ") and not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("kept", [0, 1, 7, 40, 300])
def test_a_truncated_file_is_refused_at_every_length(tmp_path, name, kept):
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save(TENSORS, path)
    else:
        save_file(TENSORS, path)
    content = path.read_bytes()
    path.write_bytes(content[: min(kept, len(content) - 1)])
    message = message_of(path)
    assert message.startswith(f"init_from: {path} ") and "\n" not in message


def test_other_files_under_a_torch_name_are_refused(tmp_path):
    text, archive, other = tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "c.pt"
    text.write_text("no weights at all\n")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "hello")
    other.write_bytes(bytes(range(256)))
    for path in (text, archive, other):
        assert message_of(path).startswith(f"init_from: {path} is not a readable torch file")


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
            read_weights(tmp_path / "w.pt", "init_from")
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"init_from: {tmp_path}/w.pt ")
    assert refused > 10


@pytest.mark.parametrize("content", [[1, 2], torch.ones(2), {"epoch": 3}, {3: torch.ones(2)}, {}])
def test_a_file_without_a_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    assert message_of(tmp_path / "w.pt").startswith(f"init_from: {tmp_path}/w.pt holds no state dict of plain tensors")


def test_a_pickle_under_a_safetensors_name_is_refused_and_not_run(tmp_path):
    path, buffer = tmp_path / "w.safetensors", io.BytesIO()
    torch.save({"a": Bomb(tmp_path / "bomb")}, buffer)
    path.write_bytes(buffer.getvalue())
    assert message_of(path).startswith(f"init_from: {path} is not a readable torch file")
    assert not (tmp_path / "bomb").exists()


def test_a_header_describes_the_tensors_and_a_forged_one_is_refused_by_name(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({**TENSORS, "none": torch.ones(0, 5), "one": torch.tensor(3)}, path, metadata={"format": "pt"})
    header = read_header(path, "x")
    assert header.metadata == {"format": "pt"} and all(tensor.is_meta for tensor in header.tensors.values())
    assert (header.tensors["a.weight"].shape, header.tensors["a.bias"].dtype) == ((2, 3), torch.int64)
    entry = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    for text in (json.dumps({"a\nERROR forged": {}}), json.dumps({"a": entry}), "[" * 1000):
        path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(8))
        for read in (read_header, read_weights):
            with pytest.raises(UserError, match=f"^x: {path} is not a readable safetensors file") as refused:
                read(path, "x")
            assert "\n" not in str(refused.value)


def test_a_run_s_weights_are_found_by_name(tmp_path):
    write_weights(tmp_path / "weights/best_weights.safetensors", TENSORS, {})
    write_weights(tmp_path / "weights/last_weights.safetensors", TENSORS, {})
    assert find_weights(str(tmp_path), "last", "weights") == tmp_path / "weights/last_weights.safetensors"
    assert choose_weights(str(tmp_path), "last") == tmp_path / "weights/last_weights.safetensors"
    assert choose_weights("nowhere near", str(tmp_path)) == tmp_path / "weights/best_weights.safetensors"
    assert find_weights(str(tmp_path / "weights/best_weights.safetensors"), "last", "w").name.startswith("best")
    with pytest.raises(UserError) as refused:
        find_weights(str(tmp_path), "ema", "weights")
    assert str(refused.value) == f"weights: the run {tmp_path} has no ema weights; it has best, last"


def test_a_folder_without_weights_and_a_path_to_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no best weights; is it a run folder that has saved a checkpoint\?$"):
        find_weights(str(tmp_path), "best", "init_from")
    with pytest.raises(UserError, match=r"^init_from: .*x does not exist; name a run folder or a weight file$"):
        find_weights(str(tmp_path / "x"), "best", "init_from")


def test_metadata_is_text_that_others_can_read(tmp_path):
    write_weights(tmp_path / "w.safetensors", TENSORS, {"step": 3})
    content = (tmp_path / "w.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["atelier"]) == {"step": 3}
