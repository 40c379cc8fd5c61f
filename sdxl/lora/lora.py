"""LoRA: low-rank changes of layers of SDXL's frozen networks, in a module of their own (sdxl/lora/changes.py: kinds).

Only the tensors of the changes are trained. The frozen networks are not modified: forward hooks add the change to a
layer's output, so a checkpoint has only these tensors.

Other tools read kohya's layout: one .safetensors file for ComfyUI, the web UIs, sd-scripts and, of kind `lora`,
diffusers (`StableDiffusionXLPipeline.load_lora_weights(FILE)`). Layers have the names of SDXL's original U-Net, with
underscores; alpha is a separate tensor. Other kinds have the names of LyCORIS.

Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1; kohya-ss/sd-scripts:networks/lora.py and library/train_util.py.
"""

import fnmatch
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sdxl.config import SDXLConfig
from sdxl.files.checkpoints import GENERATIVE_MODELS, write_modelspec
from sdxl.files.family import ENCODERS, PARTS
from sdxl.files.names import rename, text_prefix
from sdxl.lora.changes import LayerChange, draw_tensors, norm_like
from sdxl.lora.config import AdapterConfig, LoRAConfig
from sdxl.networks import Networks, open_networks, unused_layer
from utils.errors import UserError, close_names

ADAPTED = ("unet", *ENCODERS)


class LoRALayer(nn.Module):
    """The update of one layer. The tensors are float32; their product is cast to the dtype of the layer's input."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, config: AdapterConfig) -> None:
        super().__init__()
        self.kind = config.kind
        self.alpha = config.alpha
        for name, tensor in draw_tensors(config.kind, layer.weight, config.rank, config.factor).items():
            _place(self, name, nn.Parameter(tensor))

    @torch.no_grad()
    def begin(self, layer: nn.Module) -> None:
        """Set the magnitude of a new DoRA to the magnitude of the layer's weight."""
        if self.kind.startswith("dora") and not self.dora_scale.any():
            self.dora_scale.copy_(norm_like(self.dora_scale, layer.weight))

    def forward(self, layer: nn.Module, inputs: Tensor, shared: LoRAConfig) -> Tensor:
        """Return the update of the layer's output for the same inputs. shared: has the dropouts of training."""
        if self.kind != "lora":  # computed again in the backward pass: it is as large as the weight
            return checkpoint(self._add_change, layer, inputs, use_reentrant=False, preserve_rng_state=False)
        hidden = _apply(layer, inputs, self.lora_A.weight.to(inputs.dtype))
        up = (self.change().scale * self.lora_B.weight).to(inputs.dtype)
        hidden = functional.dropout(hidden, shared.network_dropout, self.training)
        if up.ndim == 2:
            return functional.linear(functional.dropout1d(hidden.mT, shared.rank_dropout, self.training).mT, up)
        return functional.conv2d(functional.dropout2d(hidden, shared.rank_dropout, self.training), up)

    def _add_change(self, layer: nn.Module, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            change = self.change().on(layer.weight).to(inputs.dtype)
        return _apply(layer, inputs, change)

    def change(self) -> LayerChange:
        """Return the change of the layer's weight."""
        return LayerChange(dict(self.named_parameters()), self.alpha)


def _apply(layer: nn.Module, inputs: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return functional.conv2d(inputs, weight, None, layer.stride, layer.padding, layer.dilation)
    return functional.linear(inputs, weight)


class LoRA(nn.Module):
    """The updates of all target layers; tensors are named `<network>.<layer>.lora_A.weight` and so on."""

    def __init__(self, networks: Networks, config: LoRAConfig) -> None:
        """Make the matrices for `networks` (unet, text_encoder, text_encoder_2). Only their shapes are used.

        Raises UserError (`task.lora.targets`) if a pattern matches no layer.
        """
        super().__init__()
        self.config = config
        layers = find_layers(networks)
        chosen = set()
        for index, pattern in enumerate(config.targets):
            if not (matching := fnmatch.filter(layers, pattern)):
                advice = close_names(pattern, layers)
                raise UserError(f"task.lora.targets.{index}: {pattern!r} matches no layer; {advice}")
            chosen.update(matching)
        self.names = [name for name in layers if name in chosen]
        for name in self.names:
            _place(self, name, LoRALayer(layers[name], config.layers.get(name, config)))
        self._hooks = []
        self._is_on = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Leave the networks' outputs as they are inside the context."""
        self._is_on = False
        try:
            yield
        finally:
            self._is_on = True

    def attach(self, networks: Networks) -> None:
        """Add the updates to the outputs of these networks' layers, after detaching from earlier networks."""
        self.detach()
        targets = find_layers(networks)
        for name in self.names:
            update = self.get_submodule(name)
            update.begin(targets[name])
            self._hooks.append(targets[name].register_forward_hook(partial(self._add, update)))

    def _add(self, update: LoRALayer, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Return a layer's output with its update: a forward hook.

        Source of the dropouts: kohya-ss/sd-scripts:networks/lora.py, LoRAModule.forward; that of modules is not scaled.
        """
        if not self._is_on:
            return output
        added = update(layer, inputs[0], self.config)
        if self.training and (share := self.config.module_dropout):
            added = added * (torch.rand((), device=added.device) >= share)
        return output + added

    def detach(self) -> None:
        """Stop updating the networks' outputs."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def merge(self, networks: Networks) -> None:
        """Add the updates to the networks' own weights, and detach."""
        self.detach()
        add_changes(networks, self.changes())

    @torch.no_grad()
    def limit_norms(self, most: float) -> None:
        """Scale both matrices of each layer whose change has a larger norm.

        Source: kohya-ss/sd-scripts:networks/lora.py, apply_max_norm_regularization.
        """
        for name in self.names:
            layer = self.get_submodule(name)
            factor = (most / layer.change().matrix().norm()).clamp(max=1).sqrt()
            for matrix in layer.parameters():
                matrix.mul_(factor)

    def changes(self) -> dict[str, LayerChange]:
        """Return the changes by the names of their layers."""
        return {name: self.get_submodule(name).change() for name in self.names}


def adapted_shapes(model: SDXLConfig) -> Networks:
    """Return the networks that a LoRA may change, on the meta device."""
    with torch.device("meta"):
        return open_networks(model, ADAPTED)


def find_layers(networks: Networks) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers that can be targets, by network and name: of the U-Net, and of the text encoders, if given."""
    layers = {}
    for network in ADAPTED:
        if network not in networks:
            continue
        prefix = text_prefix(network, networks[network])
        unused = unused_layer(networks[network]) if network == "text_encoder" else None
        for name, layer in networks[network].named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and (unused is None or unused not in name):
                layers[f"{network}.{prefix}{name}"] = layer
    return layers


@torch.no_grad()
def add_changes(networks: Networks, changes: Mapping[str, LayerChange], strength: float = 1.0) -> None:
    """Change the weights of layers by name, in the weights' dtype."""
    layers = find_layers(networks)
    for name, change in changes.items():
        weight = layers[name].weight
        weight.copy_(weight.float() + strength * change.on(weight))


def _place(root: nn.Module, name: str, part: nn.Module | nn.Parameter) -> None:
    """Add a layer or a parameter under a dotted name, and the modules above it."""
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in dict(root.named_children()):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    setattr(root, last, part)


# ------------------------------------------------------------------------------------------------------------- files


_KOHYA = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def save_lora(path: Path, changes: Mapping[str, LayerChange], dtype: torch.dtype, facts: Mapping[str, str]) -> None:
    """Write changes by the names of their layers in kohya's layout, with alpha in float32.

    facts: for `write_modelspec`, with a `title`. Ranks that differ are "Dynamic" in the header, as in sd-scripts'
    networks/resize_lora.py.
    """
    tensors = {}
    for name, change in changes.items():
        network, _, inside = name.partition(".")
        inside = rename("unet", inside, to_single=True) if network == "unet" else inside
        stem = f"{PARTS[network].lora}_{inside}".replace(".", "_")
        for key, tensor in change.tensors.items():
            tensors[f"{stem}.{_KOHYA.get(key, key)}"] = tensor.detach().to(dtype)
        tensors[f"{stem}.alpha"] = torch.tensor(change.alpha)
    metadata = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_network_module": "networks.lora" if _join("kind", changes) == "lora" else "lycoris.kohya",
        "ss_network_dim": _join("rank", changes),
        "ss_network_alpha": _join("alpha", changes),
    }
    body = save(tensors)  # the web UIs identify a file by the hash of its bytes after the header
    metadata["sshs_model_hash"] = hashlib.sha256(body[8 + int.from_bytes(body[:8], "little") :]).hexdigest()
    facts = {**facts, "architecture": "stable-diffusion-xl-v1-base/lora", "implementation": GENERATIVE_MODELS}
    write_modelspec(path, tensors, facts, metadata)


def _join(name: str, changes: Mapping[str, LayerChange]) -> str:
    """Return a value of all changes as text."""
    values = {str(getattr(change, name)) for change in changes.values()}
    return values.pop() if len(values) == 1 else "Dynamic"
