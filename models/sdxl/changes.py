"""The change of one layer's weight W by each kind of adapter, and the tensors that files have of it. s = alpha / rank.

    lora    W + s B A                       Hu et al. 2021 (arXiv 2106.09685), section 4.1
    dora    m (W + s B A) / |W + s B A|     Liu et al. 2024 (arXiv 2402.09353), equation 5; the norm has no gradient
    loha    W + s (A1 B1) * (A2 B2)         Hyeon-Woo et al. 2021 (arXiv 2108.06098), proposition 1
    lokr    W + s kron(C, A B)              Yeh et al. 2023 (arXiv 2309.14859); A B is one matrix if that is no larger

m and the norm have one value per input, as in the paper; files with one value per output (PEFT's) can be read, too.
ComfyUI divides the latter by |W|. Source: KohakuBlueleaf/LyCORIS:lycoris/modules, for names, shapes and first values.
"""

import math
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from utils.contracts import State, Tensors

Kind = Literal["lora", "dora", "loha", "lokr"]
SHOWN: dict[Kind, str] = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}


class Change(NamedTuple):
    """A layer's change. alpha: None is the rank."""

    tensors: Tensors  # by name
    alpha: float | None

    @property
    def kind(self) -> Kind:
        """The kind, by the names of the tensors."""
        if "lora_A.weight" in self.tensors:
            return "dora" if "dora_scale" in self.tensors else "lora"
        return "loha" if "hada_w1_a" in self.tensors else "lokr"

    @property
    def rank(self) -> int | None:
        """The rank; None of a LoKr of whole matrices, which alpha does not scale."""
        names = ("lora_A.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        return next((len(self.tensors[name]) for name in names if name in self.tensors), None)

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank

    def matrix(self) -> Tensor:
        """Return the change as a matrix [out, in x kernel area], without a DoRA's magnitude."""
        if self.kind in ("lora", "dora"):
            return self.scale * self._product("lora_B.weight", "lora_A.weight")
        if self.kind == "loha":
            return self.scale * (self._factor("hada_w1") * self._factor("hada_w2"))
        return self.scale * torch.kron(self._factor("lokr_w1"), self._factor("lokr_w2"))

    def _factor(self, name: str) -> Tensor:
        whole = self.tensors.get(name)
        return self._product(f"{name}_a", f"{name}_b") if whole is None else whole.flatten(1)

    def _product(self, first: str, second: str) -> Tensor:
        return self.tensors[first].flatten(1) @ self.tensors[second].flatten(1)

    def magnitude(self) -> Tensor:
        """Return a DoRA's magnitude m; 0 for other kinds."""
        return self.tensors.get("dora_scale", torch.zeros(1))

    def on(self, weight: Tensor) -> Tensor:
        """Return what is added to a layer's weight, in float32."""
        weight = weight.float()
        added = self.matrix().view(weight.shape)
        if self.kind != "dora":
            return added
        changed = weight + added
        return changed * (self.magnitude() / norm_like(self.magnitude(), changed.detach())) - weight

    def rescaled(self, alpha: float) -> Self:
        """Return the same change with another alpha."""
        linear = next(name for name in ("lora_B.weight", "hada_w2_a", "lokr_w2", "lokr_w2_a") if name in self.tensors)
        factor = self.scale / Change(self.tensors, alpha).scale
        return Change({**self.tensors, linear: self.tensors[linear] * factor}, alpha)


def norm_like(magnitude: Tensor, weight: Tensor) -> Tensor:
    """Return the norms of a weight over the axes of which the magnitude has one value."""
    axes = [axis for axis in range(weight.ndim) if magnitude.shape[axis] == 1]
    return torch.linalg.vector_norm(weight.float(), dim=axes, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)


def draw_tensors(kind: Kind, weight: Tensor, rank: int, factor: int) -> State:
    """Return the first tensors of a LoHa or LoKr of a layer, which change nothing. factor: see `LoRAConfig`."""
    out = len(weight)
    area = weight[0].numel()
    if kind == "loha":
        return {
            "hada_w1_a": 0.1 * torch.randn(out, rank),
            "hada_w1_b": torch.randn(rank, area),
            "hada_w2_a": torch.zeros(out, rank),
            "hada_w2_b": torch.randn(rank, area),
        }
    from peft.tuners.lokr.layer import factorization  # takes seconds

    rows, inner = factorization(out, factor)
    columns, width = factorization(weight.shape[1], factor)
    w1 = nn.init.kaiming_uniform_(torch.empty(rows, columns), a=math.sqrt(5))
    w2 = nn.init.kaiming_uniform_(torch.empty(inner, rank), a=math.sqrt(5))
    if rank >= max(inner, width) / 2:
        return {"lokr_w1": w1, "lokr_w2": torch.zeros(inner, width, *weight.shape[2:])}
    return {"lokr_w1": w1, "lokr_w2_a": w2, "lokr_w2_b": torch.zeros(rank, area // columns)}
