"""Imported once by the server that test processes are forked from (tests/support.py)."""

# ruff: noqa: F401
import onnxruntime
import timm.optim
import torch
import torch.distributed.tensor
import torchvision.transforms.v2

import data.build
import engine.start
import engine.tasks.classification
import engine.tasks.fcmae
import models.onnx_export
import models.predictor
