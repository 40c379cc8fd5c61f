"""torch's fused SGD kernel as plain arithmetic: the one elementwise kernel that can skip a step on the device."""

import torch


def subtract_scaled_(
    target: list[torch.Tensor],
    source: list[torch.Tensor],
    rate: float,
    *,
    decay: float = 0.0,
    copy_to: list[torch.Tensor] | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """Compute target -= rate * (source + decay * target) in one pass, and copy the source into `copy_to`.

    Where `found_inf` (a float32 scalar on the device) is 1, nothing changes, even if the source holds NaN. The lists
    hold tensors of one device and dtype; those of one index share shape and memory layout, because the kernel walks
    through memory. Tensors that are not contiguous are passed as vectors: for channels-last ones the CPU kernel would
    make a copy that it does not use. SGD keeps a copy of its first gradient as momentum: that is `copy_to`.
    """
    target, source, copies = (
        [tensor if tensor.is_contiguous() else flat_view(tensor) for tensor in tensors]
        for tensors in (target, source, copy_to or [])
    )
    torch._fused_sgd_(
        target,
        source,
        copies,
        weight_decay=decay,
        momentum=0.0 if copy_to is None else 1.0,
        lr=rate,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=copy_to is not None,
        grad_scale=None,
        found_inf=found_inf,
    )


def flat_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of a dense tensor's memory as a vector, for any order of its axes."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).view(-1)


def aligned_grad(parameter: torch.Tensor) -> torch.Tensor:
    """Return the gradient in its parameter's layout: fused kernels walk through memory without asking for strides."""
    if parameter.grad.stride() == parameter.stride():
        return parameter.grad
    return torch.empty_like(parameter).copy_(parameter.grad)
