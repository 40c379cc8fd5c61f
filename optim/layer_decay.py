"""Layer-wise learning-rate decay: the scale of each parameter's learning rate.

A parameter of layer k has the scale decay ** (last + 1 - k). The network numbers its layers: `layer_of(name, kind)` and
`last_layer(kind)` (models/convnextv2.py), or timm's `group_matcher`.

Source: facebookresearch/ConvNeXt-V2:optim_factory.py (`single`, `group`); huggingface/pytorch-image-models
timm/optim/_param_groups.py (`timm`).
"""

from torch import nn

from utils.errors import UserError


def layer_scales(network: nn.Module, kind: str, decay: float) -> dict[str, float]:
    """Return each parameter's learning-rate scale, by name. Raises UserError if the network has no layers of `kind`."""
    names = [name for name, _ in network.named_parameters()]
    if decay == 1.0:
        return dict.fromkeys(names, 1.0)
    if hasattr(network, "layer_of"):
        head = network.last_layer(kind) + 1
        return {name: decay ** (head - network.layer_of(name, kind)) for name in names}
    if not hasattr(network, "group_matcher"):
        raise UserError(
            f"optim.layer_decay: {decay:g} needs a network with numbered layers, but {type(network).__name__} has "
            "none; set optim.layer_decay=1.0, or choose a ConvNeXt V2 or a network of timm"
        )
    if kind != "timm":
        raise UserError(
            f"optim.layer_decay_kind: {kind} is for ConvNeXt V2, but {type(network).__name__} is a network of timm; "
            "set optim.layer_decay_kind=timm"
        )
    from timm.models import group_parameters

    # Same as timm.optim.param_groups_layer_decay.
    layers = group_parameters(network, network.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {name: decay ** (last - layer) for name, layer in layers.items()}
