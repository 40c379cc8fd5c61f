"""ONNX files: nothing but one self-contained file is accepted."""

from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError


def refuse_external_data(path: Path) -> None:
    """Raise UserError where an ONNX file takes data from other files, or cannot be read.

    ONNX Runtime reads files that an ONNX file names below its own folder, and older versions any file that it names.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise unreadable_onnx(path, error) from None
    for tensor in _find_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            named = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
            raise UserError(
                f"{path} takes data from another file, {named[:200]!a}, which is not read; export it as one file "
                "(export.py does)"
            )


def unreadable_onnx(path: Path, error: Exception) -> UserError:
    """Return the error for a file that is not a readable ONNX file."""
    return UserError(f"{path} is not a readable ONNX file ({(str(error) or 'damaged').splitlines()[0]})")


def _find_tensors(message: object) -> Iterator:
    """Yield every tensor of an ONNX message: of the graph, of graphs in attributes, of functions."""
    import onnx
    from google.protobuf.message import Message

    stack = [message]
    while stack:
        found = stack.pop()
        if isinstance(found, onnx.TensorProto):
            yield found
            continue
        for field, value in found.ListFields():
            if field.message_type is not None:
                stack += [value] if isinstance(value, Message) else value
