"""The chain of a run: an honest run is equal, also killed and resumed by another command; forgeries are caught."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from engine.audit import chain, replay
from engine.run import loop
from tests.in_process import TINY, make_images, run, run_until_killed, working_in
from tests.support import refuses
from utils.io.files import read_json, write_json
from utils.io.weights import hash_tensors

WORDS = [
    *TINY,
    "data.root=images",
    "run_dir=run",
    "loop.total_steps=4",
    "loop.audit_every=2",
    "model.drop_path_rate=0.3",
]


def train(folder, words, stop=-1):
    """Run the body of finetune.py as its command, up to a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["finetune.py", *words])
        patch.setattr(loop, "STOPS_AT", stop)
        try:
            run("finetune", words, folder)
        except SystemExit as end:
            assert end.code == 75


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """Return a folder with a run that was killed at step 3 and resumed by another command, and its images."""
    folder = tmp_path_factory.mktemp("audit")
    make_images(folder / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["finetune.py", *WORDS])
        run_until_killed("finetune", WORDS, folder, 3)
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
    return run("evaluate", ["job=audit", *words], place)


def repeat(place, segment):
    """Repeat one segment; returns what it shows."""
    links = chain.read_chain(place / "run")
    with working_in(place):
        return replay._repeat(place / "run", links[segment], links[segment + 1], [])


def edit_weights(place, by):
    """Change a weight of the last checkpoint, and write its link as if it were honest."""
    file = place / "run/audit/step_00000004/weights.safetensors"
    tensors = load_file(file)
    old = hash_tensors(tensors)
    next(iter(tensors.values())).view(-1)[0] += by
    file.unlink()  # a hard link
    save_file(tensors, file)
    chain_file = place / "run/chain.jsonl"
    chain_file.write_text(chain_file.read_text().replace(old, hash_tensors(tensors)))


def test_all_segments_of_a_run_that_was_killed_and_resumed_are_equal(place):
    assert [link["checkpoint"][-1] for link in chain.read_chain(place / "run")] == ["0", "2", "3", "4"]
    audit(place, "run_dir=run", "verify=9")
    said = read_json(place / "run/audit.json")["repeated"]
    assert said.startswith("3 of 3") and said.count("equal") == 3
    run("export", ["format=safetensors", "run_dir=run"], place)
    assert chain.head_of(chain.read_chain(place / "run")) in (place / "run/export/safetensors/README.md").read_text()


@pytest.mark.parametrize("cpu, by, is_seen", [(None, 1e-6, True), ("other", 1.0, True), ("other", 1e-6, False)])
def test_edited_weights_are_caught_in_another_environment_above_the_bound(place, monkeypatch, cpu, by, is_seen):
    edit_weights(place, by)
    if cpu is not None:
        monkeypatch.setattr(chain, "get_cpu_capability", lambda: cpu)
    if is_seen:
        with refuses("hashes"):
            repeat(place, 2)
    else:
        assert "cpu" in repeat(place, 2)


def test_a_swapped_image_is_caught(place):
    first, second = sorted((place / "images/train").rglob("*.png"))[:2]
    shutil.copy(first, second)
    with refuses("data"):
        repeat(place, 0)


def test_a_link_that_was_changed_later_is_refused(place):
    file = place / "run/chain.jsonl"
    file.write_text(file.read_text().replace("step_00000002", "step_00000001"))
    with refuses("run_dir"):
        audit(place, "run_dir=run")


def test_weights_and_images_are_found_with_the_published_chain_alone(place):
    inside = next((place / "images/train").rglob("*.png"))
    outside = place / "outside.png"
    outside.write_bytes(b"another")
    assert inside.name in audit(place, "run_dir=run", f"source={inside}")
    assert audit(place, "run_dir=run", f"source={outside}").endswith("none")
    (place / "published").mkdir()
    shutil.copy(place / "run/chain.jsonl", place / "published")
    weights = place / "run/weights/last_weights.safetensors"
    assert "step_00000004" in audit(place, "run_dir=published", f"weights={weights}")
    proof = Path(f"{inside}.proof.json")
    write_json(proof, {**read_json(proof), "rows": []})  # as if it had not been there
    with refuses("source"):
        audit(place, "run_dir=published", f"source={inside}")
