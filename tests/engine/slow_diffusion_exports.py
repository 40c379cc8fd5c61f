"""Other kinds of LoRA in whole commands; each kind by itself: tests/models/test_sdxl_lora.py."""

import numpy as np
import pytest
from PIL import Image

from tests.engine.test_diffusion_exports import LORA, SHORT, differ, place  # noqa: F401 (a fixture)
from tests.in_process import run


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_other_kinds_of_lora_give_the_pictures_of_the_run(kind, place):  # noqa: F811
    """The file beside the base, the merged file, and a run that continues the file."""
    words, lora = [*SHORT, *LORA, f"task.lora.kind={kind}"], f"{kind}/export/kohya/lora.safetensors"
    run("finetune_sdxl", [*words, f"run_dir={kind}"], place)
    for form in ("kohya", "single_file"):
        run("export", [f"run_dir={kind}", f"format={form}"], place)
    run("finetune_sdxl", [*SHORT, "loop.total_steps=0", f"run_dir={kind}-2", f"init_from={lora}"], place)
    (place / "prompts.txt").write_text("tag 1, tag 2\n")
    drawn = {}
    for name, more in {
        kind: [], f"{kind}/export/single_file/model.safetensors": [], f"{kind}-2": [],
        "base": [f"lora=[{lora}]"], str(place / "base"): [],
    }.items():  # fmt: skip
        output = f"{kind}-{len(drawn)}"
        size = ["pictures.image_size_hw=[64,64]", "pictures.steps=3", "device=cpu"]
        run("predict", [f"weights={name}", "prompts=prompts.txt", f"output={output}", *size, *more], place)
        drawn[name] = np.float64(Image.open(place / output / "00000-0.png"))
    first, *same, base = drawn.values()
    assert max(differ(first, other) for other in same) <= 2 and differ(first, base) > 20
