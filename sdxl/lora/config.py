"""The schemas of `task.lora` and `task.preserve`; they import no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from utils.config.bounds import BelowOne, Name, Positive, Some, Width
from utils.config.schema import Strict, text_or

AdapterKind = Literal["lora", "dora", "dora_out", "loha", "lokr"]  # rows of READERS (sdxl/lora/changes.py)


class AdapterConfig(Strict):
    """The adapter of a layer. Its update has the given rank, and is scaled by alpha / rank."""

    kind: AdapterKind
    factor: Annotated[int, Field(ge=-1)]  # of a LoKr: the size of its smaller matrix; -1: near the root
    rank: Width
    alpha: Positive


class LoRAConfig(AdapterConfig):
    """A LoRA, or another kind of adapter. layers: by name, the layers with other values.

    In training: network_dropout of the outputs of A, rank_dropout of whole ranks of a sample, module_dropout of a
    layer's whole update; scale_weight_norms: the largest norm of a layer's s B A, after each update.
    """

    # Patterns such as `unet.*.attn1.to_q` or `text_encoder*.q_proj`, of linear layers and convolutions.
    targets: list[Annotated[str, Field(pattern=r"^(unet\.|text_encoder)")]] = Field(min_length=1)
    layers: dict[str, AdapterConfig]
    network_dropout: BelowOne
    rank_dropout: BelowOne
    module_dropout: BelowOne
    scale_weight_norms: Positive | None

    @model_validator(mode="after")
    def _suits_the_kind(self) -> Self:
        others = {self.kind, *(layer.kind for layer in self.layers.values())} - {"lora"}
        for name in ("network_dropout", "rank_dropout", "scale_weight_norms") if others else ():
            if value := getattr(self, name):
                raise ValueError(f"task.lora.{name}: {value} is for kind lora, not {others.pop()}; remove it")
        return self


class PreserveConfig(Strict):
    """What holds a LoRA to its base: the loss of how far it moves the base's own predictions, times `weight`.

    prompt: words of the subject's class, for which both predict, or several, of which each sample takes one; null: the
    predictions for captions, outside of masks.
    Source: kohya-ss/sd-scripts#1710; ostris/ai-toolkit:extensions_built_in/sd_trainer/SDTrainer.py; the issue 505 of
    Nerogar/OneTrainer.
    """

    weight: Positive
    prompt: text_or(Some[Name], Name) | None
