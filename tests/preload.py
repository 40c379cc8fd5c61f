"""Imported once by the server that test processes are forked from (tests/support.py)."""

import onnxruntime  # noqa: F401
import timm.optim  # noqa: F401
import torch  # noqa: F401
import torch.distributed.tensor  # noqa: F401
import torchvision.transforms.v2  # noqa: F401

import data.build
import engine.start
import engine.tasks.classification
import engine.tasks.fcmae
import models.onnx_export
import models.predictor  # noqa: F401
