"""The change of one layer's weight W by each kind of adapter, and the tensors that files have of it. s = alpha / rank.

    lora    W + s B A                       Hu et al. 2021 (arXiv 2106.09685), section 4.1
    dora    m (W + s B A) / |W + s B A|     Liu et al. 2024 (arXiv 2402.09353), equation 5; the norm has no gradient
    loha    W + s (A1 B1) * (A2 B2)         Hyeon-Woo et al. 2021 (arXiv 2108.06098), proposition 1
    lokr    W + s kron(C, A B)              Yeh et al. 2023 (arXiv 2309.14859); A B is one matrix if that is no larger

m and the norm of a `dora` have one value per input, as in the paper, and of a `dora_out` one per output, as LyCORIS and
PEFT have. A LoHa or LoKr of LyCORIS can have such an m, too. Source: KohakuBlueleaf/LyCORIS:lycoris/modules, for names,
shapes and first values; comfyanonymous/ComfyUI:comfy/weight_adapter/base.py, for `READERS`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdxl.lora.config import AdapterKind
from utils.contracts import State, Tensors
from utils.io.files import Json

# The programs that read a file of kohya's layout as it was trained. No axis of a DoRA suits all of them.
READERS: dict[AdapterKind, str] = {
    "lora": "ComfyUI, the web UIs, sd-scripts, LyCORIS and diffusers",
    "dora": "ComfyUI and the web UIs; LyCORIS refuses it, diffusers ignores its magnitudes",
    "dora_out": "LyCORIS; ComfyUI divides by |W| in place of |W + s B A|, diffusers ignores its magnitudes",
    "loha": "ComfyUI, the web UIs and LyCORIS; not diffusers",
    "lokr": "ComfyUI, the web UIs and LyCORIS; not diffusers",
}
WHOLE = 10_000  # the rank that LyCORIS takes for a LoKr whose second matrix is whole


class LayerChange(NamedTuple):
    """A layer's change."""

    tensors: Tensors  # by name
    alpha: float

    @property
    def kind(self) -> AdapterKind:
        """The kind, by the names of the tensors."""
        if "lora_A.weight" in self.tensors:
            if "dora_scale" not in self.tensors:
                return "lora"
            return "dora" if len(self.tensors["dora_scale"]) == 1 else "dora_out"
        return "loha" if "hada_w1_a" in self.tensors else "lokr"

    @property
    def rank(self) -> int:
        """The rank; `WHOLE` of a LoKr of whole matrices, which alpha does not scale."""
        names = ("lora_A.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        return next((len(self.tensors[name]) for name in names if name in self.tensors), WHOLE)

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0 if self.rank == WHOLE else self.alpha / self.rank

    def matrix(self) -> Tensor:
        """Return the change as a matrix [out, in x kernel area], without a DoRA's magnitude."""
        if "lora_A.weight" in self.tensors:
            return self.scale * self._product("lora_B.weight", "lora_A.weight")
        if self.kind == "loha":
            return self.scale * (self._factor("hada_w1") * self._factor("hada_w2"))
        return self.scale * torch.kron(self._factor("lokr_w1"), self._factor("lokr_w2"))

    def _factor(self, name: str) -> Tensor:
        whole = self.tensors.get(name)
        return self._product(f"{name}_a", f"{name}_b") if whole is None else whole.flatten(1)

    def _product(self, first: str, second: str) -> Tensor:
        return self.tensors[first].flatten(1) @ self.tensors[second].flatten(1)

    def on(self, weight: Tensor) -> Tensor:
        """Return what is added to a layer's weight, in float32."""
        weight = weight.float()
        added = self.matrix().view(weight.shape)
        if "dora_scale" not in self.tensors:
            return added
        changed = weight + added
        magnitude = self.tensors["dora_scale"]
        return changed * (magnitude / norm_like(magnitude, changed.detach())) - weight

    def settings(self) -> Json:
        """Return the arguments of `draw_tensors`, and alpha, with which such a layer is trained."""
        rows, columns = self.tensors.get("lokr_w1", torch.empty(0, 1)).shape
        factor = rows if rows == columns else -1
        return {"kind": self.kind, "rank": self.rank, "alpha": self.alpha, "factor": factor}


def norm_like(magnitude: Tensor, weight: Tensor) -> Tensor:
    """Return the norms of a weight over the axes of which the magnitude has one value."""
    axes = [axis for axis in range(weight.ndim) if magnitude.shape[axis] == 1]
    return torch.linalg.vector_norm(weight.float(), dim=axes, keepdim=True).clamp_min(1e-7)


def draw_tensors(kind: AdapterKind, weight: Tensor, rank: int, factor: int) -> State:
    """Return the first tensors of a layer's adapter, which change nothing; a DoRA's magnitude follows (`begin`).

    weight: of the layer; only its shape is used. factor: see `AdapterConfig`.
    """
    out = len(weight)
    area = weight[0].numel()
    if kind == "loha":
        return {
            "hada_w1_a": 0.1 * torch.randn(out, rank),
            "hada_w1_b": torch.randn(rank, area),
            "hada_w2_a": torch.zeros(out, rank),
            "hada_w2_b": torch.randn(rank, area),
        }
    if kind == "lokr":
        return _draw_lokr(weight, rank, factor)
    ones = [1] * (weight.ndim - 2)
    tensors = {
        "lora_A.weight": _draw_uniform(rank, *weight.shape[1:]),
        "lora_B.weight": _draw_uniform(out, rank, *ones).zero_(),  # keeps the curve of a seed
    }
    if kind != "lora":
        axes = (1, weight.shape[1]) if kind == "dora" else (out, 1)
        tensors["dora_scale"] = torch.zeros(*axes, *ones)
    return tensors


def _draw_uniform(*shape: int) -> Tensor:
    """Return the first values of torch's linear layers."""
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))


def _draw_lokr(weight: Tensor, rank: int, factor: int) -> State:
    from peft.tuners.lokr.layer import factorization  # takes seconds

    rows, inner = factorization(len(weight), factor)
    columns, width = factorization(weight.shape[1], factor)
    w1 = _draw_uniform(rows, columns)
    w2 = _draw_uniform(inner, rank)
    if rank >= max(inner, width) / 2:
        return {"lokr_w1": w1, "lokr_w2": torch.zeros(inner, width, *weight.shape[2:])}
    return {"lokr_w1": w1, "lokr_w2_a": w2, "lokr_w2_b": torch.zeros(rank, weight[0].numel() // columns)}
