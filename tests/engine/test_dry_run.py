"""dry_run=true checks what a run would begin with, and writes nothing; `model` follows the run in init_from."""

import pytest

from tests.in_process import SHORT, TINY, make_images, run, run_command
from utils.errors import UserError
from utils.io.files import read_json

PRETRAIN = [*TINY, "data.root=images", "run_dir=pretrain", "augment.image_size_hw=[32,32]"]
WITHOUT_MODEL = [*SHORT, "data=image_folder", "augment=glyphs", "data.root=images"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, a pretraining and a fine-tuning."""
    folder = tmp_path_factory.mktemp("dry")
    make_images(folder / "images")
    run("pretrain_fcmae", PRETRAIN, folder)
    run("finetune", [*TINY, "data.root=images", "run_dir=finetuned"], folder)
    return folder


def dry(words, place):
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    try:
        return run("finetune", [*TINY, "data.root=images", "run_dir=new", "dry_run=true", *words], place)
    finally:
        after = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
        assert before == {path: after[path] for path in before} and not (place / "new").exists()


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["init_from=nowhere"], "init_from: nowhere does not exist"),
        (["init_from=pretrain", "model.dims=[8,24]"], "has model.depths=[1,1] model.dims=[8,16] model.stem_stride=2"),
        (["resume=nowhere"], "resume: nowhere is not a complete checkpoint"),
        (["run_dir=finetuned", "optim.base_lr=0.7"], "optim.base_lr: "),
    ],
)  # fmt: skip
def test_what_a_run_begins_with_is_checked(words, phrase, place):
    with pytest.raises(UserError) as caught:
        dry(words, place)
    assert phrase in str(caught.value)


def test_a_right_start_passes(place):
    assert (
        dry(["init_from=pretrain"], place)
        == dry(["run_dir=finetuned"], place)
        == "dry run: 2 steps, nothing is written"
    )


def test_the_model_follows_the_run_in_init_from(place, monkeypatch, capsys):
    words = [*WITHOUT_MODEL, "init_from=pretrain", "run_dir=follows", "model.drop_path_rate=0.1"]
    assert run_command("finetune", words, place, monkeypatch) == 0
    saved, source = (read_json(place / name / "config.json")["model"] for name in ("follows", "pretrain"))
    assert saved == source | {"drop_path_rate": 0.1}
    words = [*WITHOUT_MODEL, "init_from=pretrain", "model=convnextv2_atto", "dry_run=true"]
    assert run_command("finetune", words, place, monkeypatch) == 2
    assert "init_from: " in capsys.readouterr().err
