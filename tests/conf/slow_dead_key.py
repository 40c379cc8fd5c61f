"""Every leaf of the configuration is read by the program in real short runs, seen through `Strict.__getattribute__`.

What is read while the configuration is validated does not count. The training scripts share their leaves, and their
runs are counted together; finetune_sdxl.py has the loop, the optimisers and the trackers of them all.
"""

import shutil
import sys
import typing
from collections import defaultdict
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from engine.update.runtime import Runtime
from tests.conf.test_no_dead_key import list_models
from tests.in_process import ON_IMAGES, SCRIPTS, SHORT, SMALL_MODEL, draw_few_glyphs, load_command, make_images, run
from tests.support import TINY
from utils.config.schema import Strict
from utils.formats.vocabulary import CATEGORIES


def owner_of(model, name):
    """Return the class that states a field: `max_pixels` is one key for every kind of data."""
    return next(cls for cls in reversed(model.__mro__) if name in getattr(cls, "model_fields", ()))


def list_fields(schema):
    """Return `Model.field` of every leaf that a schema reaches, with the module of the model, but those with one value.

    A field of one allowed value (a union's tag) cannot be ignored: another value is refused.
    """
    found = {}
    for model in list_models(schema):
        for name, field in model.model_fields.items():
            one = typing.get_origin(field.annotation) is typing.Literal and len(typing.get_args(field.annotation)) == 1
            if not list_models(field.annotation) and not one:
                owner = owner_of(model, name)
                found[f"{owner.__name__}.{name}"] = owner.__module__
    return found


class Recorder:
    """See which fields the program reads of its configuration, and of the `Runtime` that it makes of one group."""

    def __init__(self, monkeypatch):
        self.seen = set()
        for cls, fields in ((Strict, lambda cls: cls.model_fields), (Runtime, lambda cls: cls.__dataclass_fields__)):
            monkeypatch.setattr(cls, "__getattribute__", self._reader(fields), raising=False)

    def _reader(self, fields):
        def read(owner, name):
            if not name.startswith("_") and name in fields(type(owner)):
                caller = sys._getframe(1).f_code
                # Validators stand in the rooms' config.py; a description is no use of a value.
                if not caller.co_filename.endswith("config.py") and caller.co_name != "describe":
                    cls = owner_of(type(owner), name).__name__ if isinstance(owner, Strict) else "Runtime"
                    self.seen.add((f"{cls}.{name}", caller.co_name))
            return object.__getattribute__(owner, name)

        return read

    def take(self):
        """Return what was read since the last call; what `choose_runtime` copies into Runtime must be read there."""
        seen, self.seen = self.seen, set()
        copies = {(f"MachineConfig.{name}", "choose_runtime") for name in Runtime.__dataclass_fields__}
        reads = {name for name, where in seen - copies}
        return reads | {name.replace("Runtime.", "MachineConfig.") for name in reads}


def without_a_cluster(monkeypatch):
    """Let submit/slurm.py go through where nothing is checked, queued or awaited."""
    jobs, which = [SimpleNamespace(job_id="7")], shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *more: name if name == "sbatch" else which(name, *more))
    monkeypatch.setattr("submit.slurm._Executor.submit_array", lambda executor, calls: jobs)
    monkeypatch.setattr("submit.slurm.check_script", lambda launch, words: None)


TAG_WEIGHTS = "{power: 0.5, low: 0.1, high: 3.0, factors: {}}"
ON_DISK = ["data.cache.disk_gib=0.1", "data.cache.folder=image_cache"]


def run_sdxl(go, data):
    """Run finetune_sdxl.py with every part of its task."""
    tiny = [*TINY["diffusion"], *(text for text in SHORT if not text.startswith("augment")), data, "task.chunk=2"]
    concepts = "{path: train/A, trigger: a, captions: {shuffle: true}}, {path: train/B, share: 0.5, is_prior: true}"
    go("finetune_sdxl", *tiny, *ON_DISK, f"data.concepts=[{concepts}]", "task.lora=null", "run_dir=sdxl_whole")
    go("finetune_sdxl", *tiny, "task.latent_cache=latents", "task.text_cache=texts", "task.text_variants=2",
       f"task.tag_weights={TAG_WEIGHTS}", "task.samples.prompts=[a]", "run_dir=sdxl")  # fmt: skip
    rule = {"sizes_hw": "null", "areas_px": "[4096]", "step_px": 32, "min_px": 32, "max_px": 128}
    go("finetune_sdxl", *tiny, *(f"task.buckets.{key}={value}" for key, value in rule.items()), "run_dir=sdxl_rule")
    short = (text for text in SHORT if not text.startswith("augment"))
    go("finetune_vae", *TINY["autoencoder"], *short, data, "task.chunk=2", "run_dir=vae")


OF_SDXL = ("finetune_sdxl", "finetune_vae")


def group_of(script):
    return "training" if script in ON_IMAGES else "sdxl" if script in OF_SDXL else script


def run_all(recorder, folder, monkeypatch):
    """Run every script so that every kind of every group is used once; returns group of scripts -> reads."""
    glyphs, images = draw_few_glyphs(folder / "glyphs"), make_images(folder / "images")
    reads = defaultdict(set)
    monkeypatch.setenv("WANDB_MODE", "offline")

    def go(script, *overrides):
        run(script, overrides, folder)
        reads[group_of(script)] |= recorder.take()

    small, folders = [*SMALL_MODEL, *SHORT], ["data=image_folder", f"data.root={images}", *ON_DISK]
    on_glyphs = f"data.root={glyphs}"
    length = ["loop.total_steps=null", "loop.total_epochs=0.2"]
    go("pretrain_fcmae", *small, on_glyphs, *length, "task.decoder_dim=8", "run_dir=fcmae")
    others = {
        "adan": [
            "optim=adan",
            "optim.rules=[{match: '*.bias', lr_scale: 0.5, weight_decay: 0.1, freeze_steps: 1}]",
            "schedule=constant",
            "loop.sampling=balanced",
            "loop.early_stop_epochs=1.0",
            "tracking=wandb",
            "augment.affine={degrees: 5.0, translate: 0.1, scale: [0.9, 1.1], shear_degrees: 5.0}",
            "augment.random_erasing=1.0",
            "augment.color_jitter={strength: 0.2, hue: 0.1}",
            "augment.rand_augment=rand-m9-mstd0.5-inc1",
        ],
        "sgd": ["optim=sgd", "schedule=onecycle", "tracking=tensorboard"],
        "timm": ["model=timm", "model.name=test_resnet", "optim=timm", "loop.ema_decay=0.9"],
    }
    rarely = ["loop.evaluate_every_epochs=50", "loop.checkpoint_every_steps=50"]  # not at each of 100 steps
    search = ["lr_finder.enabled=true", "loop.total_steps=100", *rarely]
    cosine = ["schedule=cosine", "schedule.warmup_steps=0"]
    own = {"adan": ["task.decoder_dim=8", *SMALL_MODEL], "sgd": [*SMALL_MODEL, *search], "timm": cosine}
    for script, (name, overrides) in zip(("pretrain_fcmae", "train", "finetune"), others.items(), strict=True):
        go(script, *SHORT, *folders, *own[name], *overrides, f"run_dir={name}")
    if find_spec("diffusers"):
        run_sdxl(go, f"data.root={images}")
        (folder / "prompts.txt").write_text("a")
        go("predict", "weights=sdxl", "prompts=prompts.txt", "output=pictures", "pictures.image_size_hw=[64,64]")
    tuned = [*small, on_glyphs, *ON_DISK, "run_dir=tuned", "init_from=fcmae", "loop.keep_weights_every=1"]
    go("finetune", *tuned)
    go("finetune", *tuned, "loop.total_steps=3", "optim.lr=0.1", "resume_allow=[optim.lr]")
    tagging = [*small, *folders, "lr_finder.enabled=false", "optim=adamw", "schedule=cosine"]
    go("train", *tagging, "task=tagging", "task.min_count=1", "task.loss.name=asl", "run_dir=asl")
    go("finetune", *tagging, "task=distillation", "task.teacher=asl", "run_dir=distilled")
    go("tests.tasks.multicrop", *SHORT, f"data.root={images}", "run_dir=multicrop")
    on_cpu = ["runtime.device=cpu", "runtime.threads=1"]
    go("evaluate", "run_dir=tuned", *on_cpu)
    go("evaluate", "job=grid", "run_dir=tuned", *on_cpu)
    go("export", "run_dir=tuned")
    go("evaluate", "run_dir=asl", "calibrate=true", *on_cpu)
    go("export", "run_dir=asl", "format=wd14")
    go("evaluate", "job=compare", "models=[asl]", "min_support=1", *folders, *on_cpu)
    go("predict", "weights=tuned", f"input={images}", "output=found.csv")
    go("predict", "weights=asl", f"input={images}", "output=tags.csv")
    go("prepare", "job=manifest", "job.duplicates=true", *folders)
    go("prepare", "job=check", on_glyphs)
    go("prepare", "job=pack", *folders, "job.output=packed")
    go("prepare", "job=vocabulary", *folders, "job.output=tags.csv", "job.min_count=1")
    for job in ("check", "duplicates"):
        go("prepare", f"job={job}", *folders)
    go("prepare", "job=filter", "job.find=tags<1", *folders)
    go("prepare", "job=split", *folders)
    go("prepare", "job=apply_corrections", *folders)
    go("prepare", "job=cache", *folders)
    go("prepare", "job=machine", *folders)
    (folder / "d.toml").write_text("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'")
    go("prepare", "job=import", "job.source=d.toml", "job.output=d.yaml")
    go("prepare", "job=copy", "job.to=part", *folders)
    go("prepare", "job=downsample", "job.longest_px=8", "job.to=small", *folders)
    go("workshop", f"data.root={images}", "dry_run=true")
    without_a_cluster(monkeypatch)
    go("slurm", "launch.command=[apptainer]", "launch.cpus_per_rank=2")
    return reads


# Read from the dumped values, not through an attribute: proved below.
PROVED = {
    "TrainingConfig.run_dir",
    *(f"CategoryThresholds.{name}" for name in CATEGORIES),  # tests/test_predict_tags.py
    *(f"MovedBase.{name}" for name in ("path", "vae")),  # of every evaluation: tests/engine/test_diffusion_exports.py
    *(
        f"ExportConfig.{name}" for name in ("author", "description", "trigger")
    ),  # tests/engine/test_diffusion_exports.py
    "HubConfig.dry_run",
    "HubConfig.private",  # both after an export: tests/test_weights_commands.py
    *(f"JudgeConfig.{name}" for name in ("weights", "prompts", "steps")),  # tests/engine/test_judge.py
    *(f"LibraryConfig.{name}" for name in ("name", "extra")),  # tests/engine/test_resume.py
    *(f"RuleConfig.{name}" for name in ("lr_scale", "weight_decay", "freeze_steps")),  # tests/optim
    "LoRAConfig.factor",  # of kind lokr: tests/models/test_sdxl_lora.py
    *(f"PageConfig.{name}" for name in ("host", "port", "open", "token")),
    "PageConfig.alerts",
    *(f"AlertsConfig.{name}" for name in ("disk_gib", "command", "webhook")),
    "ViewConfig.runs",  # all of view.py: tests/viewer/test_pages.py and test_watch.py
    *(f"MaskConfig.{name}" for name in ("source", "floor", "normalise")),  # tests/engine/test_diffusion.py
    *(f"LatentPerceptualConfig.{name}" for name in ("weight", "min_snr")),  # tests/models/test_sdxl_perceptual.py
    "Copy.name",  # selects the job; downsample.yaml builds on copy.yaml
    "Stage.leaves",  # of finished stages: tests/test_workshop.py
    "SweepConfig.name",
    *(f"SweepConfig.{name}" for name in ("gpus", "trials")),  # of the words: utils/config/test_sweep.py
    "LaunchConfig.ranks_per_node",  # by its own property `ranks_on_node`: tests/submit/test_slurm.py
    # The first two on the nodes: tests/submit/test_slurm.py.
    *(f"LaunchConfig.{name}" for name in ("max_requeues", "max_lost_ranks", "nodes")),
    *(f"DistillationTaskConfig.{name}" for name in ("rating_s", "aliases", "implications")),  # as those of tagging
    "NoiseConfig.convert",  # of a base model: tests/engine/test_diffusion_exports.py
    # All go to the network by one call: tests/models/test_build.py, test_fcmae.py. The name is for messages.
    *(f"FCMAETaskConfig.{name}" for name in ("decoder_dim", "decoder_depth")),
    *(
        f"ConvNeXtV2Config.{name}"
        for name in ("name", "depths", "dims", "stem_stride", "drop_path_rate", "head_init_scale")
    ),
    "AugmentConfig.mean",
    "AugmentConfig.std",
    "AugmentConfig.eval_crop",
    "AugmentConfig.eval_resize",
    "AugmentConfig.pad",
    "AugmentConfig.shrink",  # by its own method: tests/data/augment/test_shrink.py
    # By its own method: tests/data/collection, tests/data/layouts/test_corrections.py.
    *(f"DataConfig.{name}" for name in ("validation_fraction", "on_bad_sidecar", "corrections")),
}
# Refused where they are given, passed on, or of training: prepare.py decodes an image once, without a cache.
REFUSED = {
    "finetune_sdxl": ("TrainingConfig.init_weights", "_LoopConfig.sampling"),
    "finetune_vae": ("TrainingConfig.init_weights", "_LoopConfig.sampling"),
    "prepare": ("CacheConfig.", "DataConfig.background"),
    "evaluate": ("CacheConfig.memory_gib",),
    "view": ("CacheConfig.", "DataConfig.", "TextConfig."),  # test_images.py and test_try.py in tests/viewer/
    "workshop": ("CacheConfig.", "DataConfig."),  # the words go to the stages: tests/test_workshop.py
}


def find_dead(script, reads):
    """Return the leaves of a script that none of its group's runs has read."""
    fields = list_fields(load_command(script).schema)
    if script in OF_SDXL:  # the loop is that of all trainings
        fields = {
            name: room for name, room in fields.items() if not room.startswith(("engine.config", "optim.", "utils."))
        }
    # A kind of the tests is in the schema where another test of this process has imported it.
    elsewhere = (*REFUSED.get(script, ()), "ThinTaggingTaskConfig.", "MultiCropTaskConfig.", "FlowTaskConfig.")
    elsewhere += () if script == "finetune_sdxl" else ("ConceptConfig.",)  # others refuse them
    elsewhere += ("PhaseConfig.",)  # all by one call, TrainingConfig.at_phases: tests/engine/test_phases.py
    return {name for name in fields.keys() - reads[group_of(script)] - PROVED if not name.startswith(elsewhere)}


def test_every_leaf_is_read(tmp_path):
    """One test: two processes would share the scripts, and each would make all runs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        reads = run_all(Recorder(monkeypatch), tmp_path, monkeypatch)
    assert {script: dead for script in SCRIPTS if (dead := find_dead(script, reads))} == {}
