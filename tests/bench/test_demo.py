"""What the demo takes for its command line, and which folders it empties."""

import signal
import subprocess
import sys

import pytest

from bench import demo, demo_tagger


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository of an earlier demo, runs, a file and a folder that is empty."""
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    for name in ("outputs/demo/pretrain/config.json", "outputs/demo/finetune/log.txt", "outputs/old/summary.json",
                 "outputs/cut/resnet18.log", "outputs/run/config.json", "README.md"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


def files(root):
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "out", ["", ".", "outputs", "outputs/demo/..", "outputs/run", "outputs/demo/pretrain", "README.md"]
)
def test_a_folder_that_holds_other_things_is_left_alone(out, root, monkeypatch):
    before = files(root)
    monkeypatch.setattr(sys, "argv", ["demo.py", f"out={out}"])
    monkeypatch.setattr(demo, "Demo", lambda *_: pytest.fail("the demo began"))
    with pytest.raises(SystemExit, match=rf"^demo: out={out} holds other things than an earlier demo .*another folder"):
        demo.main()
    assert files(root) == before


@pytest.mark.parametrize(
    ("out", "gone"),
    [
        ("outputs/demo", "outputs/demo/"),
        ("outputs/cut", "outputs/cut/"),
        ("outputs/old", "outputs/old/"),
        ("empty", None),
        ("new/one", None),
    ],
)
def test_an_earlier_demo_is_replaced_and_nothing_else(out, gone, root):
    before = files(root)
    demo.clear(out)
    assert files(root) == {name for name in before if gone is None or not name.startswith(gone)}
    assert not (root / out).exists() or not any((root / out).iterdir())


def test_links_in_an_earlier_demo_are_taken_away_and_not_followed(root):
    (root / "outputs/demo/elsewhere").symlink_to(root / "outputs/run")
    (root / "linked").symlink_to(root / "outputs/demo")
    demo.clear("linked")
    assert (root / "linked").is_symlink() and not any((root / "outputs/demo").iterdir())
    assert (root / "outputs/run/config.json").is_file()


def test_a_resnet18_that_fails_ends_the_demo(tmp_path):
    said = rf"^demo: resnet18 ended with status 2; {tmp_path}/resnet18.log says why"
    with pytest.raises(SystemExit, match=said), demo.Demo(str(tmp_path), ["bogus=1"]).beside_resnet18("resnet18"):
        pass
    assert "bogus" in (tmp_path / "resnet18.log").read_text()


def test_a_stage_that_fails_ends_the_resnet18_beside_it(tmp_path, monkeypatch):
    started, start = [], subprocess.Popen

    def spy(*words, **more):
        started.append(start(*words, **more))
        return started[-1]

    monkeypatch.setattr(demo.subprocess, "Popen", spy)
    with pytest.raises(SystemExit, match="stage"), demo.Demo(str(tmp_path), []).beside_resnet18("resnet18"):
        sys.exit("stage")
    assert started[0].wait(timeout=60) == -signal.SIGKILL


def test_words_of_the_command_line(monkeypatch):
    words = ["full", "out=x", "runtime.threads=1", "data.root=a=b"]
    assert demo.read_arguments(words) == (True, "x", {"runtime.threads": "1", "data.root": "a=b"})
    assert demo.read_arguments([]) == (False, "outputs/demo", {})
    with pytest.raises(SystemExit, match=r"^demo: 'ful' is neither full nor KEY=VALUE; usage: python bench/demo.py \["):
        demo.read_arguments(["ful"])


def test_a_demo_ends_where_a_command_beside_it_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_tagger, "ROOT", tmp_path)
    with demo_tagger.beside("good", "out", "-c", "print('done')"):
        pass
    (log,) = tmp_path.rglob("good*")
    assert log.read_text() == "done\n"
    failed = pytest.raises(SystemExit, match=r"^demo: bad ended with status 3; .*bad\S* says why")
    with failed, demo_tagger.beside("bad", "out", "-c", "raise SystemExit(3)"):
        pass
