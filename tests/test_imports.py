"""What the commands import: the packages of `make install-sdxl` are for runs of finetune_sdxl.py alone."""

from tests.support import command

SCRIPTS = "evaluate, export, finetune, finetune_sdxl, predict, prepare, pretrain_fcmae, submit.slurm, train"
OPTIONAL = {"diffusers", "transformers", "peft", "open_clip", "ftfy"}


def test_no_script_imports_the_packages_of_sdxl_at_its_start():
    """finetune_sdxl.py does not either: it says what is missing before it builds a network."""
    code = f"import sys, {SCRIPTS}; print({OPTIONAL} & set(sys.modules))"
    done = command("python", "-c", code, OMP_NUM_THREADS="1")
    assert done.stdout.strip() == "set()", (done.stdout, done.stderr[-3000:])
