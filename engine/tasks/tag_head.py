"""How a tagger's head starts: with the tags' frequencies, and with the rows of an earlier tagger, by their tags."""

import torch
from torch import Tensor, nn

from models.image_model import find_head
from models.weights.fit import is_meta, optional_prefixes
from models.weights.initialise import convert
from utils.errors import UserError
from utils.io.weights import InitFrom, read_weights
from utils.record.logging import get_logger
from utils.vocabulary import Vocabulary, read_facts

log = get_logger(__name__)

_LOWEST = -8.0  # of a bias; a tag on no training image has no logarithm
_SHOWN = 5


def prior_bias(priors: Tensor) -> Tensor:
    """Return the biases at which an untrained head gives each tag its frequency; priors: [T], shares of images."""
    return priors.logit(eps=1e-6).clamp(_LOWEST, 0.0)


@torch.no_grad()
def continue_head(network: nn.Module, source: InitFrom, vocabulary: Vocabulary, priors: Tensor) -> None:
    """Copy the head's rows of the tags that `init_from` has too; nothing where it is no tagger of ours.

    A new tag begins with the mean of all rows of `init_from`, and the bias of its own frequency.
    Raises UserError (`init_from`) where a file's vocabulary and head do not fit together.
    """
    if source.source == "timm" or is_meta(network):
        return
    path = source.find()
    state, metadata = read_weights(path, "init_from", which=source.weights)
    if "tag_names" not in metadata:
        return
    known, state = read_facts(path, "init_from", metadata), convert(network, state)[1]
    head, (prefix, *_) = find_head(network), optional_prefixes(network)[0]
    weight, bias = (state.get(f"{prefix}{name}", torch.empty(0)) for name in ("weight", "bias"))
    if len(weight) != len(known) or len(bias) != len(known) or weight[0].numel() != head.in_features:
        raise UserError(f"init_from: {path} has no head of its {len(known)} tags; give the file of a whole tagger")
    weight = weight.flatten(1)
    pairs = [(row, known.columns[key]) for key, row in vocabulary.columns.items() if key in known.columns]
    rows, old = torch.tensor(pairs, dtype=torch.long).view(-1, 2).unbind(1)
    head.weight.copy_(weight.mean(0))
    head.bias.copy_(prior_bias(priors))
    head.weight[rows], head.bias[rows] = weight[old].to(head.weight), bias[old].to(head.bias)
    found = set(rows.tolist())
    new = [name for row, name in enumerate(vocabulary.names) if row not in found]
    shown = ", ".join(new[:_SHOWN]) + (", ..." if len(new) > _SHOWN else "")
    log.info("init_from: the head continues %d tags of %s; new: %d (%s)", len(pairs), path, len(new), shown or "none")
