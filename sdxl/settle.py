"""What SDXL decides before a run: values of the VAE, noise, a continued LoRA, prompts, concepts and memory.

They are recorded, and compared on resume.
"""

from pathlib import Path

from data.collection.choose import training_rows
from data.collection.concepts import find_repeats
from data.images.sizes import SIZES, image_sizes
from engine.tasks.change import AnyConfig, ConfigChange, Start
from models.interop.metadata import dict_of
from sdxl.caches.buckets import choose_sizes
from sdxl.config import NoiseConfig
from sdxl.lora.files import OF_FILES, describe_lora
from sdxl.lora.lora import adapted_shapes
from sdxl.memory import fit_memory
from sdxl.networks import describe_base, settle_model
from sdxl.pictures.prompts import count_brackets, read_prompt_file
from utils.contracts import InitFrom
from utils.errors import UserError, about
from utils.io.files import Json
from utils.io.weight_files import find_initial
from utils.record.logging import log
from utils.record.run_reader import run_of


def settle_vae(config: AnyConfig, start: Start) -> AnyConfig:
    """Return the configuration with the values of the VAE."""
    return config.changed({"model": settle_model(config.model)})


def _settle_noise(config: AnyConfig, start: Start) -> AnyConfig:
    settled = settle_noise(config.model.path, config.task.noise)
    return config.changed({f"task.noise.{name}": value for name, value in settled.items()})


def settle_noise(path: str | None, noise: NoiseConfig) -> Json:
    """Return `prediction_type` and `zero_terminal_snr` without auto; warn of facts that a base model's file lacks.

    What is typed is believed where the file does not say what the model predicts. Raises UserError (`task.noise`) if
    the file contradicts it, or has another noise schedule.
    """
    base = {"prediction_type": "v_prediction", "zero_terminal_snr": True, "is_stated": None, "other_noise": None}
    facts = base if path is None else describe_base(path)
    if unread := facts.get("unread"):
        log.warning("model.path: %d tensors of %s belong to no network, such as %s", len(unread), path, unread[0])
    if not noise.convert:
        base = facts
    kind = base["prediction_type"] if noise.prediction_type == "auto" else noise.prediction_type
    zero_terminal_snr = noise.zero_terminal_snr
    if zero_terminal_snr == "auto":
        # Programs sample without it if a file does not state it.
        zero_terminal_snr = base["prediction_type"] == kind and bool(base["zero_terminal_snr"])
    settled = {"prediction_type": kind, "zero_terminal_snr": zero_terminal_snr}
    convert = "task.noise.convert=true to convert it to the current settings, which takes a long run"
    if base["other_noise"]:
        raise UserError(f"task.noise: {path} was trained otherwise: {base['other_noise']}; set {convert}")
    stated = {name: base[name] for name in settled if base[name] is not None}
    words = " ".join(f"task.noise.{name}={str(value).lower()}" for name, value in stated.items())
    if base["is_stated"] and stated != {name: settled[name] for name in stated}:
        raise UserError(f"task.noise: {path} is a model of {words}; set that, or {convert}")
    if base["is_stated"]:
        log.info("task.noise: %s predicts %s, which is trained", path, kind)
    elif base["is_stated"] is False:
        log.warning(
            "task.noise: %s does not say what it predicts; it is trained as %s (programs take epsilon). If its author "
            "says another, set task.noise.prediction_type and task.noise.zero_terminal_snr", path, kind,
        )  # fmt: skip
    if base["zero_terminal_snr"] is None:
        log.warning(
            "task.noise: %s predicts v and does not say whether its last timestep is pure noise; it is trained as "
            "task.noise.zero_terminal_snr=%s says: ask its author", path, str(zero_terminal_snr).lower(),
        )  # fmt: skip
    return settled


def _continue_lora(config: AnyConfig, start: Start) -> AnyConfig:
    """Return the configuration with the LoRA of `init_from`; a resumed run has it, even if the source is gone."""
    if config.task.lora is None or config.init_from is None:
        return config
    run = config.run_dir and run_of(Path(config.run_dir))
    saved = run.config if run else {}
    lora = saved.get("init_from") == config.init_from and dict_of(saved, "task").get("lora")
    if not lora:
        with about("init_from"):
            path = find_initial(InitFrom(config.init_from, config.init_weights))
            lora = describe_lora(path, adapted_shapes(config.model))
    return config.changed({f"task.lora.{name}": lora[name] for name in OF_FILES})


def _read_prompts(config: AnyConfig, start: Start) -> AnyConfig:
    samples = config.task.samples
    key = "task.samples.prompts"
    if isinstance(samples.prompts, str):
        config = config.changed({key: read_prompt_file(samples.prompts, samples.image_size_hw, key)})
    texts = [prompt.words for prompt in config.task.samples.complete_all()]
    count_brackets(texts, config.task.captions.emphasis, f"{key} (task.captions.emphasis)")
    return config


def _find_concepts(config: AnyConfig, start: Start) -> AnyConfig:
    """Return the configuration with folders `10_name` as concepts, and the trigger in captions."""
    data = config.data
    concepts = data.concepts
    if concepts is None and data.name == "image_folder":
        concepts = find_repeats(data.root) or None
    if data.trigger is not None:
        if data.concepts or config.task.captions.prefix:
            raise UserError(
                f"data.trigger: {data.trigger!r} is the trigger of all images; remove it where data.concepts or "
                "task.captions.prefix states others"
            )
        config = config.changed({"task.captions.prefix": data.trigger})
        concepts = concepts and [concept.without_trigger() for concept in concepts]
    return config.changed({"data.concepts": concepts})


def _fit_buckets(config: AnyConfig, start: Start) -> AnyConfig:
    """Return the configuration with the sizes of `task.buckets.fit`."""
    buckets = config.task.buckets
    if buckets.fit is None:
        return config
    collection = start.collection(config.data)
    image_hw = image_sizes(collection, training_rows(collection, config.loop), SIZES)
    image_hw = image_hw[image_hw.all(axis=1)]
    sizes_hw = [choose_sizes(sizes, image_hw, buckets.fit).tolist() for sizes in buckets.sizes()]
    return config.changed({"task.buckets.sizes_hw": sizes_hw})


FIT = ConfigChange(_fit_buckets, "these sizes crop the images little", "task.buckets.fit")
CHANGES = (
    ConfigChange(settle_vae, "the VAE has these values"),
    ConfigChange(_settle_noise, "the base model was trained so"),
    ConfigChange(_continue_lora, "the LoRA goes on", "init_from"),
    ConfigChange(_read_prompts, "task.samples.prompts is a file"),
    ConfigChange(_find_concepts, "data.root and data.trigger say so"),
    FIT,
    ConfigChange(fit_memory, "runtime.memory_gib is to suffice"),
)
