"""The demo of SDXL: a tiny one learns captioned shapes and tones, and reaches black and white if its noise lets it.

python bench/demo_sdxl.py [out=FOLDER] [vae_steps=N] [KEY=VALUE ...]     (`make demo-sdxl`; values go to all trainings)

Draws pictures of several ratios and a base model, whose VAE it trains (bench/tiny_sdxl.py). Then finetune_sdxl.py
trains the whole U-Net twice, side by side: by epsilon with SDXL's own noise, whose last timestep still shows how bright
a picture is, and by v_prediction with zero terminal SNR. Only the second makes pictures all black or all white. A LoRA
on its export learns a tone that is new to it. diffusers loads all exports, and must draw the pictures of the runs.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from bench.commands import ROOT, rows_of
from bench.demo import begin, finish, run_stage
from bench.demo_tagger import beside
from bench.tiny_sdxl import write_base, write_pictures
from utils.record.pictures import image_rows
from utils.record.report_files import save_image
from utils.text_table import align_columns

NEW = "orange"  # which the LoRA learns
CAPTIONS = ["black", "white", "red circle", "green square", "blue triangle", "yellow circle"]
EPSILON = ("task.noise.prediction_type=epsilon", "task.noise.zero_terminal_snr=false", "task.noise.convert=true")
LORA = ("task.lora={rank:16,alpha:16.0,targets:[unet.*],conv:true,text_encoders:false}", "optim.lr=3e-3",
        "loop.total_steps=60", f"task.samples.prompts=[{NEW},black,white]")  # fmt: skip


def run(out, overrides, vae_steps):
    """Run all stages; returns their seconds and the VAE's error."""
    seconds = {}

    def stage(name, *words):
        seconds[name] = run_stage(name, list(words))

    def training(name, base, pictures, *words):
        cache = f"{out}/cache/{name}"
        return ("finetune_sdxl.py", "experiment=sdxl/demo", f"model.path={out}/{base}", f"data.root={out}/{pictures}",
                f"run_dir={out}/{name}", f"task.latent_cache={cache}/latents", f"task.text_cache={cache}/texts",
                *words, *overrides)  # fmt: skip

    def export(name, *formats):
        for one in formats:
            stage(f"{name}_{one}", "export.py", f"format={one}", f"run_dir={out}/{name}", "weights=last")

    sys.stderr.write("\n== base: pictures, and a VAE for them\n")
    started = time.perf_counter()
    write_pictures(ROOT / out / "shapes", CAPTIONS, 48)
    write_pictures(ROOT / out / NEW, [NEW, "black", "white"], 24)
    error = write_base(ROOT / out / "base", CAPTIONS, vae_steps)
    seconds["base"] = round(time.perf_counter() - started, 1)
    v_prediction = training("v_prediction", "base", "shapes")
    with beside("epsilon", out, *training("epsilon", "base", "shapes", *EPSILON)):
        stage("v_prediction", *v_prediction)
    export("v_prediction", "diffusers", "single_file")
    stage("lora", *training("lora", "v_prediction/export/diffusers", NEW, *LORA))
    export("lora", "kohya")
    stage("resume", *v_prediction)
    return {"seconds": seconds, "vae_error": error}


def draw_by_diffusers(out):
    """Return the greatest difference of 255 between the runs' last pictures and diffusers' own from each export."""
    from diffusers import StableDiffusionXLPipeline

    exported = ROOT / out / "v_prediction/export"
    folder = exported / "diffusers"
    by_folder = StableDiffusionXLPipeline.from_pretrained(folder)
    by_file = StableDiffusionXLPipeline.from_single_file(
        str(exported / "single_file/model.safetensors"), config=str(folder), local_files_only=True
    )
    found = {"diffusers": compare(by_folder, out, "v_prediction"), "single_file": compare(by_file, out, "v_prediction")}
    by_folder.load_lora_weights(ROOT / out / "lora/export/kohya", weight_name="lora.safetensors")
    return {**found, "kohya": compare(by_folder, out, "lora")}


def compare(pipeline, out, name):
    """Return the greatest difference of 255 between a run's last pictures and a pipeline's."""
    import torch

    config = json.loads((ROOT / out / name / "config.json").read_text())["task"]["samples"]
    height, width = config["image_size_hw"]
    pipeline.set_progress_bar_config(disable=True)
    drawn = [
        pipeline(
            prompt, height=height, width=width, num_inference_steps=config["steps"], output_type="np",
            guidance_scale=config["guidance"], guidance_rescale=config["guidance_rescale"],
            generator=torch.Generator().manual_seed(config["seed"] + number),
        ).images[0] * 255
        for number, prompt in enumerate(config["prompts"])
    ]  # fmt: skip
    return float(np.abs(np.concatenate(drawn, axis=1) - np.asarray(samples(out, name), dtype=np.float32)).max())


def samples(out, name):
    """Return the pictures of a run's last evaluation, side by side."""
    return Image.open(ROOT / out / name / "plots/samples.png")


def draw_sheet(out):
    """Write the pictures of both noises under each other."""
    names = ("epsilon", "v_prediction")
    rows = [np.split(np.asarray(grid), grid.width // grid.height, axis=1) for grid in (samples(out, n) for n in names)]
    save_image(ROOT / out / "samples.png", image_rows(rows, names))


def collect(out):
    """Return the figures that the runs left in their files: the tones of a prompt are those of all its pictures."""
    found = {}
    for name in ("epsilon", "v_prediction", "lora"):
        config = json.loads((ROOT / out / name / "config.json").read_text())
        row, tones = rows_of(ROOT / out / name, "evaluate")[-1], {}
        for number, prompt in enumerate(config["task"]["samples"]["prompts"]):
            tones.setdefault(prompt, []).append(row[f"tone_{number}"])
        found[name] = {"loss": row["loss"], "tones": tones}
    return found


def table(found, out):
    """Return the closing table."""
    rows = [("mean brightness, 0 to 1, asked for", "black", "white"), ("  of the training pictures", "0.00", "1.00")]
    titles = {"epsilon": "epsilon, SDXL's noise", "v_prediction": "v_prediction, zero terminal SNR"}
    for name, title in titles.items():
        rows.append((f"  {title}", *(f"{np.mean(found[name]['tones'][tone]):.2f}" for tone in ("black", "white"))))
    lines = [align_columns(rows), "", f"error of the VAE's pictures: {found['vae_error']:.1f} of 255"]
    lines += [f"diffusers against the run, {name}: {value:.1f} of 255" for name, value in found["differences"].items()]
    lines += ["", *(f"{name:<25} {value:.0f} s" for name, value in found["seconds"].items())]
    lines.append(f"all stages                {sum(found['seconds'].values()):.0f} s")
    lines += [f"picture  {out}/{name}" for name in ("samples.png", "lora/plots/samples.png")]
    lines.append(f"for ComfyUI: {out}/v_prediction/export/single_file, {out}/lora/export/kohya")
    return "\n".join(lines)


def main():
    _, out, arguments = begin(["out=outputs/demo_sdxl", *sys.argv[1:]])
    vae_steps = int(arguments.pop("vae_steps", 250))
    found = run(out, [f"{key}={value}" for key, value in arguments.items()], vae_steps)
    started = time.perf_counter()
    found["differences"] = draw_by_diffusers(out)
    found["seconds"]["diffusers"] = round(time.perf_counter() - started, 1)
    draw_sheet(out)
    found |= collect(out)
    finish(out, found, table(found, out))


if __name__ == "__main__":
    main()
