"""The facts in the headers of SDXL's exports: ModelSpec's, and those that sd-scripts writes (`ss_`).

Only what is known is written. A stranger may have made the weight file, so all values become texts.
"""

import json
import math
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from engine.exports.weights import Weights
from engine.tasks.diffusion import DiffusionTaskConfig
from models.interop.metadata import dict_of, licence_entry
from models.sdxl.changes import SHOWN
from models.sdxl.vae import unlike_sdxls


def modelspec_facts(weights: Weights, given: Mapping[str, str | None]) -> dict[str, str]:
    """Return the facts for `write_modelspec`, and sd-scripts'. given: author, description and trigger, or None."""
    task = weights.setup.task
    metadata = weights.metadata
    images = dict_of(metadata, "trained_on").get("images")
    source = Path(str(dict_of(metadata, "origin").get("source") or "SDXL")).name
    what = "VAE"
    facts: dict[str, Any] = {"title": weights.title, "date": date.today().isoformat(), "author": given["author"]}
    facts |= licence_entry(metadata)
    if isinstance(task, DiffusionTaskConfig):
        what = "U-Net" if task.lora is None else f"{SHOWN[task.lora.kind]} of rank {task.lora.rank}"
        model = weights.setup.model
        facts |= {
            "trigger_phrase": given["trigger"],
            "ss_sd_model_name": source,
            "ss_vae_name": Path(model.vae or "").name,
            "ss_vae_values": unlike_sdxls(model.vae_values),
            **_describe_training(task, metadata),
        }
    described = f"{what} of {source}, after {metadata['step']} steps" + (f" on {images} images" if images else "")
    facts |= {"description": given["description"] or described, "ss_output_name": weights.title}
    known = {name: value for name, value in facts.items() if value not in (None, "", {})}
    return {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in known.items()}


def _describe_training(task: DiffusionTaskConfig, metadata: Mapping[str, Any]) -> dict[str, Any]:
    trained_on = dict_of(metadata, "trained_on")
    facts = {
        "prediction_type": task.noise.prediction_type,
        "ss_new_sd_model_hash": dict_of(metadata, "origin").get("sha256"),
        "ss_num_train_images": trained_on.get("images"),
        "ss_learning_rate": metadata.get("lr"),
        "ss_steps": metadata["step"],
        "ss_tag_frequency": trained_on.get("tag_frequency"),
        "ss_zero_terminal_snr": task.noise.zero_terminal_snr,
        "ss_discrete_flow_shift": task.stated_noise.get("shift"),
        "ss_noise_offset": task.noise.offset,
        "ss_min_snr_gamma": task.loss.gamma if task.loss.weighting == "min_snr" else None,
        "ss_caption_dropout_rate": task.captions.caption_dropout,
        "ss_mixed_precision": metadata.get("precision"),
    }
    buckets = [((width, height), count) for height, width, count in trained_on.get("buckets") or ()]
    if buckets:
        # The bucket of most images; of several, the largest, then the squarest.
        (width, height), _ = max(buckets, key=lambda one: (one[1], math.prod(one[0]), min(one[0])))
        numbered = {str(n): {"resolution": size, "count": count} for n, (size, count) in enumerate(buckets)}
        facts |= {
            "resolution": f"{width}x{height}",
            "ss_resolution": f"({width}, {height})",
            "ss_enable_bucket": True,
            "ss_bucket_info": {"buckets": numbered},
        }
    return facts
