"""Imported once by the server that test processes are forked from (tests/support.py)."""

# ruff: noqa: F401
import onnxruntime
import timm.optim
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
import torchvision.transforms.v2

import evaluate
import export
import finetune
import predict
import prepare
import pretrain_fcmae
import train
import utils.record.lettering
import utils.record.plots

utils.record.lettering.legible("a")  # reads its fonts
