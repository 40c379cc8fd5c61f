"""Weights of timm that a command may fetch from the hub by itself, in a bounded time.

huggingface_hub bounds neither the lookup of a host's name nor a whole download. So its calls run in threads, and the
command does not wait longer for a thread than it has time.
"""

from collections.abc import Callable
from functools import partial
from threading import Thread
from typing import Any, NamedTuple

from models.config import Pretrained
from models.weights.timm_hub import WEIGHTS, cached_file, cached_names, find_config
from utils.io.safe_text import hide_secrets
from utils.record.logging import get_logger

log = get_logger(__name__)

_ANSWER_SEC = 2.0
_MOST_SEC = 120.0  # of a download: other ranks wait


class Offer(NamedTuple):
    """A network. megabytes: of its file. cost: of training an image, relative to resnet10t of 32 channels."""

    name: str
    megabytes: int
    cost: float


# Apache-2.0, of any image size; timm's registry states the preprocessing. By cost: CPU time on one core at 96 px, in
# the faster of bf16 and float32 (float32 but for the last; the resnet10t takes 3.8 ms).
OFFERS = (
    Offer("mobilenetv4_conv_small.e2400_r224_in1k", 15, 2.0),
    Offer("tf_efficientnet_lite0.in1k", 19, 4.4),
    Offer("convnext_nano.in12k_ft_in1k", 62, 8.4),
)


def list_weights(pretrained: Pretrained, most_cost: float, seconds: float) -> list[str]:
    """Return the networks of timm whose weights a command may use, which are in the cache, small files first.

    "auto" fetches those of the costliest offer up to `most_cost`: the hub has two seconds to answer, and the download
    `seconds`, two minutes at most. A failure is a line in the log. Only one rank may call it.
    """
    if pretrained == "never":
        return []
    fitting = [offer for offer in OFFERS if offer.cost <= most_cost]
    if pretrained == "auto" and fitting and cached_file(fitting[-1].name) is None:
        _fetch(fitting[-1], min(seconds, _MOST_SEC))
    return cached_names()


class _Call(Thread):
    """A call whose end the command need not await. error: the first line of the exception, or an empty text."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        super().__init__(daemon=True)
        self._call = partial(function, *arguments, **options)
        self.error = ""
        self.start()

    def run(self) -> None:
        """Call the function."""
        try:
            self._call()
        except Exception as error:  # the hub's own classes, the connection's and the disk's
            self.error = hide_secrets((str(error) or type(error).__name__).splitlines()[0])

    def ends_within(self, seconds: float, what: str) -> bool:
        """Return whether the call succeeds within this time; log a warning otherwise."""
        self.join(seconds)
        if self.is_alive():
            log.warning("%s are not fetched: no answer within %.0f s", what, seconds)
        elif self.error:
            log.warning("%s are not fetched: %s", what, self.error)
        return not (self.is_alive() or self.error)


def _fetch(offer: Offer, seconds: float) -> None:
    """Fetch the weights of an offer, or log why they are not fetched."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import disable_progress_bars

    repository = f"timm/{offer.name}"
    what = f"the weights of timm's {offer.name} ({offer.megabytes} MB, {find_config(offer.name).license})"
    what += f" from {constants.ENDPOINT}"
    question = _Call(get_hf_file_metadata, hf_hub_url(repository, WEIGHTS), timeout=_ANSWER_SEC)
    if question.ends_within(_ANSWER_SEC, what):
        disable_progress_bars()  # a thread that is left would draw into the run's
        log.info("fetching %s for at most %.0f s; model.pretrained=cached fetches none", what, seconds)
        _Call(hf_hub_download, repository, WEIGHTS).ends_within(seconds, what)
