"""The closing table of a demo, from the files that its runs left; also written to summary.json in the demo's folder.

python bench/demo_table.py glyphs|tagger|sdxl FOLDER          (bench/demo.sh, demo_tagger.sh, demo_sdxl.sh)
"""

import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from utils.io.files import read_json
from utils.record.figures import align_columns
from utils.record.run_reader import RunReader


def rows_of(run, kind):
    """Return a run's rows of figures of one kind: train, evaluate or epoch."""
    return [row for row in RunReader(run).rows if row["kind"] == kind]


def training_seconds(out, *runs):
    """Return the seconds of the steps of some runs, without their evaluations and start-up."""
    return sum(rows_of(out / run, "epoch")[-1]["seconds"] for run in runs)


def glyphs(out):
    """Return the figures, rows and pictures of demo.sh."""
    losses = [row["loss"] for row in rows_of(out / "pretrain", "train")]
    arms = {
        "one face: FCMAE, then fine-tuning": ("finetune", ("pretrain", "finetune")),
        "one face: ResNet-18 from scratch (train.py)": ("resnet18", ("resnet18",)),
        "one face: the same ConvNeXt V2 from scratch": ("scratch", ("scratch",)),
        "all labels: FCMAE, then fine-tuning": ("all_labels", ("pretrain", "all_labels")),
        "all labels: ResNet-18 from scratch (train.py)": ("all_labels_resnet18", ("all_labels_resnet18",)),
    }
    arms = {title: arm for title, arm in arms.items() if (out / arm[0]).is_dir()}  # only `full` runs the controls
    top1 = {run: rows_of(out / run, "evaluate")[-1]["top1"] for run, _ in arms.values()}
    difference = read_json(out / "finetune/export/export.json")["model.onnx"]["onnx_max_abs_diff"]
    rows = [("top-1 on an unseen typeface, 958 characters", "guessing: 0.001", "1-NN on pixels, all labels: 0.31")]
    rows += [(title, f"{top1[run]:.3f}", f"in {training_seconds(out, *runs):.0f} s of training")
             for title, (run, runs) in arms.items()]  # fmt: skip
    rows += [("pretraining loss", f"{losses[0]:.3f} -> {losses[-1]:.3f}", ""),
             ("ONNX against PyTorch", f"{difference:.1e}", "")]  # fmt: skip
    pictures = ["pretrain/plots/curves", "pretrain/plots/reconstructions", "finetune/plots/curves",
                "finetune/plots/evaluate_confusion", "finetune/plots/evaluate_mistakes"]  # fmt: skip
    figures = {"top1": top1, "pretrain_loss": [losses[0], losses[-1]], "onnx_max_abs_diff": difference}
    return figures, rows, pictures


def sided_ap(run):
    """Return the mean AP of the tags that a mirror exchanges."""
    with open(run / "tables/tags.csv", newline="") as stream:
        found = [row["ap"] for row in csv.DictReader(stream) if row["tag"].startswith(("left", "right")) and row["ap"]]
    return float(np.mean([float(text) for text in found]))


def tagger(out):
    """Return the figures, rows and pictures of demo_tagger.sh."""
    arms = {
        "train.py: ResNet-18 from scratch": ("tagger", ("tagger",)),
        "FCMAE, then fine-tuning": ("finetune", ("pretrain", "finetune")),
    }
    figures = {run: rows_of(out / run, "evaluate")[-1] for run, _ in arms.values()}
    sided = {run: sided_ap(out / run) for run in ("tagger", "no_map")}
    rows = [("unseen typeface", "mAP", "macro F1 at P = R", "")]
    for title, (run, runs) in arms.items():
        seconds = f"in {training_seconds(out, *runs):.0f} s of training"
        rows.append((title, f"{figures[run]['mAP']:.3f}", f"{figures[run]['macro_f1']:.3f}", seconds))
    rows += [("mean AP of left and right tags", f"{sided['tagger']:.3f}", "with the orientation map", ""),
             ("", f"{sided['no_map']:.3f}", "without it, not mirrored", "")]  # fmt: skip
    with open(out / "predictions.jsonl") as stream:
        example = next(row for row in map(json.loads, stream) if row.get("tags"))
    rows += [(Path(example["path"]).name, str(example["tags"]), "", "")]
    pictures = [f"tagger/plots/{name}" for name in ("curves", "pr_curves", "mistakes")]
    return {**figures, "sided_ap": sided}, rows, pictures


def samples(run):
    """Return the pictures of a run's last evaluation, float32 [N, H, W, 3] from 0 to 255."""
    grid = np.asarray(Image.open(run / "plots/samples.png"), dtype=np.float32)
    return np.stack(np.split(grid, len(read_json(run / "config.json")["task"]["samples"]["prompts"]), axis=1))


def compare(pipeline, run):
    """Return the greatest difference, of 255, between a run's last pictures and a diffusers pipeline's."""
    import torch

    config = read_json(run / "config.json")["task"]["samples"]
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
    return float(np.abs(np.stack(drawn) - samples(run)).max())


def draw_by_diffusers(out):
    """Return each export's difference in pictures from its run."""
    from diffusers import StableDiffusionXLPipeline

    exported = out / "v_prediction/export"
    by_folder = StableDiffusionXLPipeline.from_pretrained(exported / "diffusers")
    by_file = StableDiffusionXLPipeline.from_single_file(
        str(exported / "single_file/model.safetensors"), config=str(exported / "diffusers"), local_files_only=True
    )
    run = out / "v_prediction"
    found = {"diffusers": compare(by_folder, run), "single_file": compare(by_file, run)}
    by_folder.load_lora_weights(out / "lora/export/kohya", weight_name="lora.safetensors")
    return {**found, "kohya": compare(by_folder, out / "lora")}


def sdxl(out):
    """Return the figures, rows and pictures of demo_sdxl.sh."""
    titles = {"epsilon": "epsilon, SDXL's noise", "v_prediction": "v_prediction, zero terminal SNR"}
    figures = {"tones": {}, "differences": draw_by_diffusers(out)}
    rows = [("mean brightness, 0 to 1, asked for", "black", "white"), ("  of the training pictures", "0.00", "1.00")]
    for name, title in titles.items():
        prompts = np.array(read_json(out / name / "config.json")["task"]["samples"]["prompts"])
        tones = samples(out / name).mean(axis=(1, 2, 3)) / 255
        figures["tones"][name] = {tone: float(tones[prompts == tone].mean()) for tone in ("black", "white")}
        rows.append((f"  {title}", *(f"{value:.2f}" for value in figures["tones"][name].values())))
    rows += [(f"diffusers against the run, {name}", f"{value:.1f} of 255", "")
             for name, value in figures["differences"].items()]  # fmt: skip
    return figures, rows, [f"{name}/plots/samples" for name in (*titles, "lora")]


def main():
    demo, out = {"glyphs": glyphs, "tagger": tagger, "sdxl": sdxl}[sys.argv[1]], Path(sys.argv[2])
    figures, rows, pictures = demo(out)
    pictures = [out / f"{name}.png" for name in pictures]
    if missing := [str(path) for path in pictures if not path.is_file()]:
        sys.exit(f"demo: no picture was made at {', '.join(missing)}")
    seconds = {name: int(text) for name, text in map(str.split, (out / "seconds.txt").read_text().splitlines())}
    (out / "summary.json").write_text(json.dumps({**figures, "seconds": seconds}, indent=2) + "\n")
    lines = [align_columns(rows), "", *(f"{name:<26} {value} s" for name, value in seconds.items())]
    lines += [f"all stages                 {sum(seconds.values())} s", *(f"picture {path}" for path in pictures)]
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
