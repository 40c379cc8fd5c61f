"""Complete programs for the README.md of an export: from an image file to predictions, in the library of the format.

Each runs unchanged in the folder of the export, with an image.png in it. The .txt files in this folder are
string.Templates of the programs, and this module fills in what depends on the weights.
"""

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from models.outputs import OUTPUTS
from utils.formats.background import background_levels, background_of, background_rgb

SDXL = {  # the line that loads a format
    **dict.fromkeys(("kohya", "lora_diffusers"), """from_pretrained($base)
pipeline.load_lora_weights(".", weight_name="$file")"""),
    "single_file": 'from_single_file("$file", config=$base)',
    **dict.fromkeys(("vae", "vae_single_file"), 'from_single_file("$file", config=$base, subfolder="vae")'),
    **dict.fromkeys(("diffusers", "vae_diffusers"), 'from_pretrained(".")'),
}  # fmt: skip
_RESIZED = {
    "squash": "image = image.resize(($width, $height), $resample)",
    "crop": """factor = max($resized_width / image.width, $resized_height / image.height)
size = [int(side * factor + 1e-6) for side in image.size]
image = image.resize((max($width, size[0]), max($height, size[1])), $resample)
left, top = round((image.width - $width) / 2), round((image.height - $height) / 2)
image = image.crop((left, top, left + $width, top + $height))""",
}
_CALLS = {  # with a head, and for a backbone
    "timm": ("model(batch)[0]", "model.forward_features(batch).mean((-2, -1))[0]"),
    "transformers": ("model(**batch).logits[0]", "model(**batch).last_hidden_state.mean((-2, -1))[0]"),
}
_ENCODER = '{name.removeprefix("encoder."): tensor for name, tensor in state.items()}, strict=False'
_NAMES = {
    "timm": 'json.load(open("config.json")).get("label_names") or range(len(outputs))',
    "transformers": "model.config.id2label.values()",
    "onnx": 'json.loads(session.get_modelmeta().custom_metadata_map["atelier"])["$names_key"]',
}


def program(form: str, metadata: Mapping[str, Any], file: str, base: str | None) -> str | None:
    """Return the program for a format as Markdown. file: the exported file. base: the hub's name of SDXL's base model.

    Our own format has a command. Diffusers reads no adapter of another kind than LoRA.
    """
    if form == "kohya" and metadata["task"]["lora"]["kind"] != "lora":
        return None
    if form != "safetensors":
        text = _sdxl_snippet(form, metadata["task"], file, base) if form in SDXL else _snippet(form, metadata, file)
        return f"```python\n{text.rstrip()}\n```"
    if metadata.get("task"):
        return f"    python predict.py weights={file} input=image.png output=predictions.jsonl"
    return f"    python finetune.py init_from={file} data=image_folder data.root=PATH"


def _sdxl_snippet(form: str, task: Mapping[str, Any], file: str, base: str | None) -> str:
    """Return the program that draws the first prompt of a task, as its evaluation does, or decodes an image again."""
    load = Template(SDXL[form]).substitute(file=file, base=repr(base or "PATH OF THE BASE MODEL"))
    if form.startswith("vae"):
        return _read_template("vae").substitute(load=load)
    from models.sdxl.family import SCHEDULE
    from models.sdxl.sampling import SamplesConfig, scheduler_config

    samples, noise = SamplesConfig.model_validate(task["samples"]), task["noise"]
    values = samples.complete(samples.prompts[0] if samples.prompts else "...", samples.seed).model_dump()
    values |= {name: ascii(values[name]) for name in ("text", "negative")}
    values["height"], values["width"] = values["image_size_hw"]
    scheduler = scheduler_config(noise["prediction_type"], noise["zero_terminal_snr"], task["timesteps"]["shift"])
    values["class"] = scheduler.pop("_class_name")
    values["scheduler"] = {name: value for name, value in scheduler.items() if name not in SCHEDULE}
    return _read_template("sdxl").substitute(values, load=load)


def _read_template(name: str) -> Template:
    return Template((Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8"))


def _snippet(form: str, metadata: Mapping[str, Any], file: str) -> str:
    """Return the program that predicts with an image network."""
    preprocessing, output = metadata["preprocessing"], OUTPUTS[metadata["output"]]
    height, width = preprocessing["image_size_hw"]
    form = "wd14" if form == "wd_repository" else form
    # A tagger in timm's format takes BGR (engine/exports/formats.py).
    is_bgr = form == "timm" and output.has_tags
    has_head, is_white = output.activate is not None, form in ("wd14", "cl_tagger")
    values = {
        "image": _read_image(
            preprocessing, white_square=is_white or is_bgr, padded=form in ("onnx", "pth", "imgutils")
        ),
        "file": file,
        "width": width,
        "height": height,
        "resized_width": int(width / preprocessing["eval_crop"]),
        "resized_height": int(height / preprocessing["eval_crop"]),
        "resample": f"Image.Resampling.{preprocessing['interpolation'].upper()}",
        "axes": "[None, None]" if preprocessing["channels"] == 1 else ".transpose(2, 0, 1)[None]",
        "mean": preprocessing["mean"],
        "std": preprocessing["std"],
        "turn": "[:, [2, 1, 0]]  # BGR" if is_bgr else "",
        "network": "ConvNextV2ForImageClassification" if has_head else "ConvNextV2Model",
        "call": _CALLS.get(form, ("", ""))[0 if has_head else 1],
        "names_key": output.names_key,
        "model": metadata["model"],
        "classes": len(metadata.get(output.names_key, ())),
        "state": "state" if has_head else _ENCODER,
        "activation": "" if not has_head else ".sigmoid()" if output.has_tags else ".softmax(-1)",
    }
    values["resize"] = Template(_RESIZED[preprocessing.get("eval_resize", "crop")]).substitute(values)
    values["result"] = "print(outputs)"
    if has_head and form in _NAMES:
        activation = "" if form == "onnx" else values["activation"]
        shown = f"print(sorted(zip(outputs{activation}.tolist(), names), reverse=True)[:5])"
        values["result"] = f"names = {_NAMES[form]}\n{shown}"
    values["result"] = Template(values["result"]).substitute(values)
    return _read_template(form).substitute(values)


def _read_image(preprocessing: Mapping[str, Any], *, white_square: bool, padded: bool) -> str:
    """Return the lines that read `image`, upright, on the background of the network's training.

    white_square: centre it on a white square, like programs for taggers. padded: centre it on a square of the
    background if training did so.
    """
    colour, mode = background_rgb(background_of(preprocessing)), "L" if preprocessing["channels"] == 1 else "RGB"
    lines = ['image = ImageOps.exif_transpose(Image.open("image.png"))']
    if colour is None:
        lines.append(f'image = image.convert("{mode}")  # drops transparency, as in training')
    else:
        lines += [
            'image = image.convert("RGBA")',
            f'canvas = Image.new("RGBA", image.size, {(*colour, 255)})  # the background in training',
            'image = Image.alpha_composite(canvas, image).convert("RGB")' + ('.convert("L")' if mode == "L" else ""),
        ]
    levels: object = "white" if white_square else None
    if levels is None and padded and preprocessing.get("pad", "none") != "none":
        channels = background_levels(background_of(preprocessing), preprocessing["channels"])
        levels = tuple(channels) if len(channels) == 3 else channels[0]
    if levels is not None:
        lines += [
            "side = max(image.size)",
            f"square = Image.new(image.mode, (side, side), {levels!r})",
            "square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))",
            "image = square",
        ]
    return "\n".join(lines)
