"""Every leaf of the configuration is read by the program in real short runs, seen through `Strict.__getattribute__`.

What is read while the configuration is validated does not count. The training scripts share their leaves, and their
runs are counted together; finetune_sdxl.py has the loop, the optimisers and the trackers of them all.
"""

import re
import shlex
import shutil
import sys
import typing
from collections import defaultdict
from fnmatch import filter as find
from importlib.util import find_spec
from string import Template
from types import SimpleNamespace

from engine.update.runtime import Runtime
from tests.conf.test_no_dead_key import list_models
from tests.in_process import ON_IMAGES, SCRIPTS, SHORT, SMALL_MODEL, draw_few_glyphs, load_command, make_images, run
from tests.support import TINY
from utils.config.schema import Strict


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


def record_reads(monkeypatch):
    """Return a set that gets the fields that the program reads of its configuration, and of `Runtime`, made of it."""
    seen = set()
    copied = Runtime.__dataclass_fields__

    def read(owner, name):
        cls = type(owner)
        if not name.startswith("_") and name in (copied if cls is Runtime else cls.model_fields):
            caller = sys._getframe(1).f_code
            # A validator (`_name`, `check_x`) or a description is no use of a value, nor is a copy into Runtime.
            model = "MachineConfig" if cls is Runtime else owner_of(cls, name).__name__
            is_copy = caller.co_name == "choose_runtime" and model == "MachineConfig" and name in copied
            in_schema = caller.co_filename.endswith("config.py")
            is_check = in_schema and re.search(r"(^|\.)(_|check_|describe)", caller.co_qualname)
            if not is_copy and caller.co_name != "describe" and not is_check:
                seen.add(f"{model}.{name}")
        return object.__getattribute__(owner, name)

    for cls in (Strict, Runtime):
        monkeypatch.setattr(cls, "__getattribute__", read, raising=False)
    return seen


def without_a_cluster(monkeypatch):
    """Let submit/slurm.py go through where nothing is checked, queued or awaited."""
    jobs, which = [SimpleNamespace(job_id="7")], shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *more: name if name == "sbatch" else which(name, *more))
    monkeypatch.setattr("submit.slurm._Executor.submit_array", lambda executor, calls: jobs)
    monkeypatch.setattr("submit.slurm.check_script", lambda launch, words: None)


# Every kind of every group is used once. A word with $ stands for the words that a line above names so.
COMMANDS = r"""
small = $network $short
images = data.root=images
disk = data.cache.disk_gib=0.1 data.cache.folder=image_cache
folders = data=image_folder $images $disk
glyphs = data.root=glyphs
cpu = runtime.device=cpu runtime.threads=1
sdxl = $diffusion $loop $images task.chunk=2
vae = $autoencoder $loop $images task.chunk=2
tagger = $small $folders lr_finder.enabled=false optim=adamw schedule=cosine
pretrain_fcmae $small $glyphs loop.total_steps=null loop.total_epochs=0.2 task.decoder_dim=8 run_dir=fcmae
pretrain_fcmae $short $folders task.decoder_dim=8 $network optim=adan schedule=constant loop.sampling=balanced \
    "optim.rules=[{match: '*.bias', lr_scale: 0.5, weight_decay: 0.1, freeze_steps: 1}]" \
    loop.early_stop_epochs=1.0 tracking=wandb augment.random_erasing=1.0 run_dir=adan \
    "augment.affine={degrees: 5.0, translate: 0.1, scale: [0.9, 1.1], shear_degrees: 5.0}" \
    "augment.color_jitter={strength: 0.2, hue: 0.1}" \
    augment.rand_augment=rand-m9-mstd0.5-inc1
train $short $folders $network lr_finder.enabled=true loop.total_steps=null loop.total_epochs=auto \
    loop.auto.samples=8 loop.evaluate_every_epochs=50 loop.checkpoint_every_steps=50 optim=sgd schedule=onecycle \
    tracking=tensorboard run_dir=sgd
train $folders $cpu loop.minutes=0.1 dry_run=true run_dir=planned
finetune $short $folders schedule=cosine schedule.warmup_steps=0 model=timm model.name=test_resnet optim=timm \
    loop.ema_decay=0.9 run_dir=timm
finetune_sdxl $sdxl $disk task.lora=null run_dir=sdxl_whole \
    "data.concepts=[{path: train/A, trigger: a, captions: {shuffle: true}}, {path: train/B, share: .5, is_prior: true}]"
finetune_sdxl $sdxl task.latent_cache=latents task.text_cache=texts task.text_variants=2 task.samples.prompts=[a] \
    "task.tag_weights={power: 0.5, low: 0.1, high: 3.0, factors: {}}" run_dir=sdxl
finetune_sdxl $sdxl task.buckets.sizes_hw=null task.buckets.areas_px=[4096] task.buckets.step_px=32 \
    task.buckets.min_px=32 task.buckets.max_px=128 run_dir=sdxl_rule
finetune_vae $vae run_dir=vae
predict weights=sdxl prompts=prompts.txt output=pictures pictures.image_size_hw=[64,64]
finetune $small $glyphs $disk run_dir=tuned init_from=fcmae loop.keep_weights_every=1
finetune $small $glyphs $disk run_dir=tuned init_from=fcmae loop.keep_weights_every=1 \
    loop.total_steps=3 optim.lr=0.1 resume_allow=[optim.lr]
train $tagger task=tagging task.min_count=1 task.loss.name=asl run_dir=asl
train $tagger task=tagging task.min_count=1 task.loss.name=focal run_dir=focal init_from=asl \
    "task.tag_weights={power: 1.0, window_steps: 2}"
tests.tasks.multicrop $short $images run_dir=multicrop
evaluate run_dir=tuned $cpu
export run_dir=tuned
evaluate run_dir=asl calibrate=true $cpu
export run_dir=asl format=wd14
evaluate job=compare models=[asl] min_support=1 $folders $cpu
predict weights=tuned input=images sort=sorted
predict weights=asl input=images output=tags.csv
prepare job=manifest $folders
prepare job=check $glyphs
prepare job=pack $folders job.output=packed
prepare job=vocabulary $folders job.output=tags.csv job.min_count=1
prepare job=check $folders
prepare job=labels job.weights=fcmae $folders
prepare job=duplicates $folders
prepare job=filter job.find=tags<1 $folders
prepare job=apply_corrections $folders
prepare job=cache $folders
prepare job=cache job.fill=true data.cache.disk_gib=0.01 data.cache.folder=kept $folders
prepare job=machine $folders
prepare job=import job.source=d.toml job.output=d.yaml
prepare job=copy job.to=part $folders
slurm launch.command=[apptainer] launch.cpus_per_rank=2
"""
OF_SDXL = ("finetune_sdxl", "finetune_vae")


def group_of(script):
    return "training" if script in ON_IMAGES else "sdxl" if script in OF_SDXL else script


def run_all(seen, folder):
    """Run the commands; returns group of scripts -> reads."""
    draw_few_glyphs(folder / "glyphs")
    make_images(folder / "images")
    (folder / "prompts.txt").write_text("a")
    (folder / "d.toml").write_text("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'")
    given = {"short": SHORT, "loop": SHORT[1:], "network": SMALL_MODEL, **TINY}
    words = {name: shlex.join(texts) for name, texts in given.items()}
    reads = defaultdict(set)
    for line in COMMANDS.replace("\\\n", "").strip().splitlines():
        script, *overrides = shlex.split(Template(line).safe_substitute(words))
        if overrides[0] == "=":
            words[script] = shlex.join(overrides[1:])
        elif find_spec("diffusers") or ("sdxl" not in line and script != "finetune_vae"):
            run(script, overrides, folder)
            reads[group_of(script)] |= seen
            seen.clear()
    return reads


# Fields that are read from the dumped values, or all by one call, with where that is proved. After a script: what is
# refused there, passed on, or of training. prepare.py decodes an image once, without a cache.
PROVED = """
TrainingConfig: run_dir
CategoryThresholds: general artist copyright character meta rating     # tests/test_predict_tags.py
MovedBase: path vae                                 # of every evaluation: tests/sdxl/test_diffusion_exports.py
ExportConfig: author description trigger            # tests/sdxl/test_diffusion_exports.py
HubConfig: dry_run private                          # after an export: tests/test_weights_commands.py
ProdigyConfig: name extra                           # tests/engine/test_resume.py
RuleConfig: lr_scale weight_decay freeze_steps      # tests/optim
AdapterConfig: factor                               # of kind lokr: tests/sdxl/test_lora_layers.py
PageConfig: host port open token start              # tests/viewer/test_pages.py, test_start.py
ViewConfig: runs
MaskConfig: source floor normalise                  # tests/sdxl/test_diffusion.py
ConceptConfig: mask                                 # with task.mask: tests/sdxl/test_masks.py
BucketConfig: min_px max_px                         # tests/sdxl/test_buckets.py
PerceptualConfig: path lpips                        # tests/sdxl/slow_perceptual.py
PictureConfig: image_size_hw steps guidance sampler # tests/sdxl/test_diffusion.py, tests/test_predict_pictures.py
LossConfig: huber_schedule huber_c huber_scale      # tests/sdxl/test_diffusion_step.py
PreserveConfig: weight prompt                       # tests/sdxl/test_diffusion.py
DrawConfig: negative                                # tests/test_predict_pictures.py
WandbTrackingConfig: project weights                        # tests/utils/record/test_trackers.py
SweepConfig: name gpus wandb                        # of the words: tests/utils/config/test_sweep.py
LaunchConfig: ranks_per_node max_requeues max_lost_ranks nodes         # on the nodes: tests/submit/test_slurm.py
NoiseConfig: convert                                # of a base model: tests/sdxl/test_diffusion_exports.py
NoiseConfig: multires_discount                      # tests/sdxl/test_diffusion.py
FCMAETaskConfig: decoder_dim decoder_depth          # to the network: tests/models/test_build.py, test_fcmae.py
ConvNeXtV2Config: name depths dims stem_stride drop_path_rate head_init_scale
AugmentConfig: mean std eval_crop eval_resize pad shrink               # tests/data/augment, tests/engine/test_golden.py
DataConfig: validation_fraction on_bad_sidecar corrections table columns       # tests/data
DataConfig: trigger                                 # tests/sdxl/test_diffusion_concepts.py
PhaseConfig: *                                      # TrainingConfig.at_phases: tests/engine/test_phases.py
finetune_sdxl TrainingConfig: init_weights
finetune_sdxl _LoopConfig: sampling
finetune_vae TrainingConfig: init_weights
finetune_vae _LoopConfig: sampling
finetune_vae ConceptConfig: *
pretrain_fcmae train finetune evaluate predict prepare view ConceptConfig: *
prepare CacheConfig: *
prepare DataConfig: icc background
evaluate CacheConfig: memory_gib
view CacheConfig: *                                 # tests/viewer/test_images.py and test_try.py
view DataConfig: *
view TextConfig: *
"""


def list_proved(script):
    """Yield patterns of the fields of a script that are in PROVED."""
    for line in PROVED.strip().splitlines():
        head, names = line.partition("#")[0].split(":")
        *scripts, model = head.split()
        if not scripts or script in scripts:
            yield from (f"{model}.{name}" for name in names.split())


def find_dead(script, reads):
    """Return the leaves of a script that none of its group's runs has read."""
    # The loop of SDXL is that of all trainings; kinds of the tests are there where another test has imported them.
    without = ("tests.", "engine.config", "optim.", "utils.") if script in OF_SDXL else ("tests.",)
    fields = list_fields(load_command(script).schema)
    dead = {name for name, module in fields.items() if not module.startswith(without)} - reads[group_of(script)]
    return dead.difference(*(find(dead, pattern) for pattern in list_proved(script)))


def test_every_leaf_is_read(tmp_path, monkeypatch):
    """One test: two processes would share the scripts, and each would make all runs."""
    without_a_cluster(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    reads = run_all(record_reads(monkeypatch), tmp_path)
    assert {script: dead for script in SCRIPTS if (dead := find_dead(script, reads))} == {}
