"""Checks of files that strangers made, one module per format. They are called where a file enters the program.

| file | checked by | called from |
|---|---|---|
| safetensors header | `safetensors_header.py` | `utils/io/weights.py` |
| torch archive and pickle | `torch_file.py` | `utils/io/weights.py` |
| ONNX graph | `onnx_file.py` | `models/predictor.py` |
| config.json beside weights | `folder_config.py` | `engine/tasks/foreign.py`, `models/weights/origin.py` |
| Parquet manifest | `parquet.py` | `data/manifest_formats.py` |

Three checks need to know more than the format, and are in the rooms that do: metadata of a weight file
(`models/predictor.py: check_metadata`), state of an optimiser (`optim/state.py: check_optimizer_state`), and images
(`data/decode.py`).
"""
