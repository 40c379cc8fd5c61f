"""The chain of a run: an honest run is equal, also killed and resumed by another command; forgeries are caught."""

import shutil
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from torch.backends.cpu import get_cpu_capability

from engine.audit import chain, replay
from engine.run import loop
from tests.in_process import TINY, make_images, run, run_until_killed
from tests.support import refuses
from utils.io.weights import hash_tensors

WORDS = [
    *TINY,
    "data.root=images",
    "run_dir=run",
    "loop.total_steps=4",
    "loop.audit_every=2",
    "model.drop_path_rate=0.3",
]


def train(folder, words, stop=-1, kill=False):
    """Run the body of finetune.py as its command, up to a step. kill: at step 3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["finetune.py", *words])
        patch.setattr(loop, "STOPS_AT", stop)
        with suppress(SystemExit):
            run_until_killed("finetune", words, folder, 3) if kill else run("finetune", words, folder)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """Return a folder with a run that was killed at step 3 and resumed by another command, and its images."""
    folder = tmp_path_factory.mktemp("audit")
    make_images(folder / "images")
    train(folder, WORDS, kill=True)
    train(folder, [*WORDS, "loop.log_every_steps=3"])
    return folder


@pytest.fixture
def place(honest, tmp_path, monkeypatch):
    """Return a copy to forge. Segments are repeated in this process."""

    def repeat_here(command, env, **_):
        start = next(place for place, word in enumerate(command) if word.endswith(".py")) + 1
        train(tmp_path, command[start:], int(env[chain.STOP_VARIABLE]))

    monkeypatch.setattr(replay, "subprocess", SimpleNamespace(run=repeat_here))
    shutil.copytree(honest, tmp_path, dirs_exist_ok=True)
    return tmp_path


def audit(place, *words):
    return run("evaluate", ["job=audit", "verify=9", *words], place)


def read_card(place):
    run("export", ["format=safetensors", "run_dir=run", "weights=last"], place)
    return (place / "run/export/safetensors/README.md").read_text()


def edit_weights(place, by):
    """Change a weight of the last checkpoint, and write its link as if it were honest."""
    file = place / "run/audit/step_00000004/weights.safetensors"
    links = place / "run/chain.jsonl"
    tensors = load_file(file)
    text = links.read_text().replace(hash_tensors(tensors), "NEW")
    tensors["head.weight"][0, 0] += by
    save_file(tensors, file)
    links.write_text(text.replace("NEW", hash_tensors(tensors)))


def test_all_segments_are_equal_and_the_card_says_so_until_the_run_goes_on(place):
    links = chain.read_chain(place / "run")
    assert [link["checkpoint"][-1] for link in links] == ["0", "2", "3", "4"]
    audit(place, "run_dir=run")
    card = read_card(place)
    assert chain.head_of(links) in card and card.count("equal") == 3
    train(place, [*WORDS, "loop.total_steps=5"])
    assert "Proof" not in read_card(place)


@pytest.mark.parametrize(
    "cpu, by, is_seen", [(get_cpu_capability(), 1e-6, True), ("other", 1.0, True), ("other", 1e-8, False)]
)
def test_edited_weights_are_caught_in_another_environment_above_the_bound(place, monkeypatch, cpu, by, is_seen):
    edit_weights(place, by)
    monkeypatch.setattr(chain, "get_cpu_capability", lambda: cpu)
    with refuses("hashes") if is_seen else nullcontext():
        audit(place, "run_dir=run")


def test_bf16_is_not_judged_in_another_environment(place, monkeypatch):
    shutil.rmtree(place / "run")
    train(place, [*WORDS, "runtime.precision=bf16"])
    edit_weights(place, 1e-8)
    monkeypatch.setattr(chain, "get_cpu_capability", lambda: "other")
    with refuses("rounded to 16 bits"):
        audit(place, "run_dir=run")


def test_weights_and_images_are_found_with_the_published_chain_alone_and_a_swapped_image_is_caught(place):
    inside = next((place / "images/train").rglob("*.png"))
    audit(place, "run_dir=run", f"source={inside}")
    shutil.copytree(place / "run", place / "published", ignore=lambda *_: ["audit", "config.json"])
    assert "step_00000004" in audit(place, "run_dir=published", "weights=run/weights/last_weights.safetensors")
    assert inside.name in audit(place, "run_dir=published", f"source={inside}")  # by its proof
    inside.write_bytes(b"another")
    with refuses("data"):
        audit(place, "run_dir=run")


def test_a_link_that_a_kill_has_lost_is_written_when_the_run_goes_on(place):
    links = place / "run/chain.jsonl"
    written = links.read_text()
    links.write_text("".join(written.splitlines(keepends=True)[:-1]))
    train(place, [*WORDS, "loop.log_every_steps=3"])
    assert links.read_text() == written


@pytest.mark.parametrize(
    "file, old, new, said",
    [
        ("chain.jsonl", "step_00000002", "step_00000001", "run_dir: a link"),
        ("config.json", "0.05", "0.04", "weight_decay"),
    ],
)
def test_a_changed_chain_or_configuration_is_refused(file, old, new, said, place):
    path = place / "run" / file
    path.write_text(path.read_text().replace(old, new))
    with refuses(said):
        audit(place, "run_dir=run")
