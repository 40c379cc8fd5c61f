"""The facts in the headers of SDXL's exports, under the names of ModelSpec and of sd-scripts (`ss_`).

Unknown facts are not written. A stranger may have made the weight file, so all values become texts.
"""

import json
import math
from datetime import date
from pathlib import Path

from engine.tasks.config import TaskConfig
from models.interop.metadata import dict_of, licence_entry
from sdxl.config import DiffusionTaskConfig
from utils.config.recipe import flatten
from utils.io.files import Json, read_beside
from utils.record.run_reader import RunReader


def state_facts(title: str, task: TaskConfig, metadata: Json, run: RunReader | None) -> dict[str, str]:
    """Return the facts for `write_modelspec`, and the facts of sd-scripts. metadata: of the weights of a run."""
    trained_on = dict_of(metadata, "trained_on")
    images = trained_on.get("images")
    source = Path(str(dict_of(metadata, "origin").get("source") or "SDXL")).name
    what = "VAE"
    facts = {
        "title": title,
        "date": date.today().isoformat(),
        **licence_entry(metadata),
        "ss_output_name": title,
    }
    if isinstance(task, DiffusionTaskConfig):
        what = "U-Net" if task.lora is None else f"{task.lora.kind} of rank {task.lora.rank}"
        facts |= {
            "trigger_phrase": trained_on.get("trigger"),
            "prediction_type": task.noise.prediction_type,
            "ss_sd_model_name": source,
            "ss_discrete_flow_shift": task.stated_noise.get("shift"),
            "ss_tag_frequency": trained_on.get("tag_frequency"),
            "ss_min_snr_gamma": task.loss.gamma if task.loss.weighting == "min_snr" else None,
        }
        known = flatten({**(run.config if run else {}), **metadata})
        names = read_beside(__file__, "ss_names.yaml")
        facts |= {name: known.get(key) for name, key in names.items()}
        if buckets := trained_on.get("buckets"):
            counted = ({"resolution": [w, h], "count": count} for h, w, count in buckets)
            facts["ss_bucket_info"] = {"buckets": dict(enumerate(counted))}
            # The bucket of most images; of several, the largest, then the squarest.
            height, width, _ = max(buckets, key=lambda one: (one[2], math.prod(one[:2]), min(one[:2])))
            facts["resolution"] = f"{width}x{height}"
            facts["ss_resolution"] = f"({width}, {height})"
    described = f"{what} of {source}, after {metadata['step']} steps"
    if images:
        size = trained_on.get("batch_size")
        described += f"{f' of {size} samples' if size else ''} on {images} images"
    facts["description"] = described
    stated = {name: value for name, value in facts.items() if value not in (None, "")}
    return {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in stated.items()}
