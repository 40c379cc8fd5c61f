"""Corrections: what changes a collection, what is reported, and what a full disk or a kill leaves of their file."""

import codecs
import resource
import signal
import threading

import pytest

from data.layouts.corrections import Decision, Desk, append_corrections, read_corrections, retag
from data.layouts.names import CORRECTIONS
from data.layouts.unused import Unused
from data.tools.config import Manifest
from tests.data.collection.test_collection import columns, opened, put, root  # noqa: F401
from tests.support import data_config, refuses, rows


def decide(path, was, now, verdict="edited", by="a", field=None):
    field = field or ("tags" if isinstance(was, list) else "label")
    return Decision(path=path, field=field, was=was, now=now, verdict=verdict, by=by, at="2026")


@pytest.fixture
def animals(root):  # noqa: F811
    return put(root, "cat/1.png", "cat/2.png", "cat/3.png", "dog/1.png", "dog/2.png")


def labels(collection):
    return [label for (label,) in columns(collection, "label")]


def test_decisions_change_the_labels_and_the_fingerprint_and_not_the_split(animals, opened):  # noqa: F811
    plain = opened(animals, 0.3)
    append_corrections(animals, [decide("cat/1.png", "cat", "cat", "rejected")])
    assert opened(animals, 0.3).fingerprint == plain.fingerprint
    append_corrections(animals, [decide("cat/3.png", "cat", "dog")])
    corrected = opened(animals, 0.3)
    assert labels(corrected) == ["cat", "cat", "dog", "dog", "dog"] and corrected.fingerprint != plain.fingerprint
    assert columns(corrected, "path", "split") == columns(plain, "path", "split")


def test_weights_and_groups(animals, opened, log):  # noqa: F811
    names = [f"cat/{number}.png" for number in range(1, 4)]
    plain = opened(animals, 0.3)
    append_corrections(animals, [decide("dog/1.png", 1.0, 0.0, field="weight")])
    weighed = opened(animals, 0.3)
    assert weighed.fingerprint != plain.fingerprint and columns(weighed, "split") == columns(plain, "split")
    assert weighed.weights().tolist() == [1, 1, 1, 0, 1] and "decides on 1 " in log.text
    append_corrections(animals, [decide(name, None, 7, field="group") for name in names])
    assert {split for (split,) in columns(opened(animals, 0.3), "split")[:3]} == {"train"}, "a group is not torn"
    assert columns(plain, "split")[:3].count(("val",)) == 1
    Manifest(name="manifest", verify=False).run(data_config(root=str(animals), validation_fraction=0.3))
    (animals / CORRECTIONS).unlink()
    assert columns(opened(animals), "group", "weight")[2:4] == [(7, 1.0), (None, 0.0)]


@pytest.mark.parametrize("lines, label", [
    (["cat dog edited", "cat bird edited"], "bird"),  # two reviewers: the later one counts
    (["cat dog edited", "cat bird edited", "cat cat undone"], "dog"),
    (["cat dog edited", "cat cat undone"], "cat"),
    (["cat dog edited a", "cat bird edited b", "cat cat undone a"], "bird"),  # nobody undoes another's decision
    (["cat bird edited b", "cat dog edited a", "cat cat undone a", "cat cat undone a"], "bird"),
    (["dog cat edited", "dog dog undone"], "dog"),  # undone after job=apply_corrections
    (["dog cat edited"], "cat"),  # the manifest of job=manifest has it already
    (["fox dog edited"], "cat"),  # another label now: reported
])  # fmt: skip
def test_which_decision_counts(animals, opened, log, lines, label):  # noqa: F811
    append_corrections(animals, [decide("cat/1.png", *line.split()) for line in lines])
    assert labels(opened(animals))[0] == label
    is_taken_back = len(lines) == 2 and "undone" in lines[1]
    assert ("decides on 1 labels" in log.text) != is_taken_back
    assert ("changed since: cat/1.png" in log.text) == ("fox" in lines[0])


def test_tags_and_their_caption(root, opened, caplog):  # noqa: F811
    put(root, "1.png", "2.png", text="1girl, blue hair\n")
    had = ["1girl", "blue hair"]
    append_corrections(root, [decide("1.png", had, ["1girl", "hat"]), decide("gone.png", had, [])])
    assert columns(opened(root), "tags", "caption") == [(["1girl", "hat"], "1girl, hat"), (had, "1girl, blue hair")]
    assert "1 corrections of images that the collection has not: gone.png" in caplog.text
    assert retag("A girl in a hat. She smiles.\n1girl, hat", ["1girl", "hat"], ["1girl"]).endswith("smiles.\n1girl")
    assert retag("hat\n>_<, big\nblue", ["hat", ">_<, big", "blue"], ["hat", "blue", "sky"]) == "hat\n\nblue\nsky"


def test_the_manifest_takes_them_and_agrees_with_them(animals, opened, tmp_path, monkeypatch, caplog):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    append_corrections(animals, [decide("cat/1.png", "cat", "dog"), decide("cat/2.png", "fox", "dog")])
    data = data_config(root=str(animals), validation_fraction=0.0)
    for corrections, label in ((True, "dog"), (False, "cat")):
        taken = data.model_copy(update={"corrections": corrections})
        Manifest(name="manifest", verify=False).run(taken)
        assert ("changed since: cat/2.png" in caplog.text) == corrections
        (held := animals / CORRECTIONS).rename(tmp_path / "held")
        assert labels(opened(animals))[0] == label
        (tmp_path / "held").rename(held)
        assert labels(opened(animals))[0] == "dog"
        caplog.clear()


def test_bad_lines_are_named_and_good_ones_count(animals, opened, caplog):  # noqa: F811
    for number in (1, 2):
        append_corrections(animals, [decide(f"cat/{number}.png", "cat", "dog")])
    first, second = (animals / CORRECTIONS).read_bytes().splitlines(keepends=True)
    bad = '{"path": "y"}\n{"path": "cat/2.png", "was": "é'.encode()
    (animals / CORRECTIONS).write_bytes(codecs.BOM_UTF8 + first + second + bad[:-1])
    assert labels(opened(animals)) == ["dog", "dog", "cat", "dog", "dog"]
    assert "jsonl, line 3 (field: Field required)" in caplog.text and "jsonl, line 4 (" in caplog.text
    desk = Desk(animals)
    decisions, fault = desk.sync([decide("cat/3.png", "cat", "dog")])
    assert len(decisions) == 3 and fault.startswith("2 lines of corrections.jsonl") and "wait" not in fault
    assert labels(opened(animals)) == ["dog"] * 5


def test_a_full_disk_takes_no_part_of_a_decision(animals):
    append_corrections(animals, [decide("cat/1.png", "cat", "dog")])
    before = (animals / CORRECTIONS).read_bytes()
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
        with refuses(r"^data\.corrections: .*corrections\.jsonl cannot be written"):
            append_corrections(animals, [decide("cat/2.png", "cat", "dog")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert (animals / CORRECTIONS).read_bytes() == before


def test_many_reviewers_append_whole_lines(animals):
    lines = [decide("cat/1.png", "cat", "dog", by=str(number)) for number in range(4)]
    threads = [threading.Thread(target=lambda own=own: [append_corrections(animals, [own]) for _ in range(20)])
               for own in lines]  # fmt: skip
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(rows(animals / CORRECTIONS)) == 80


def test_a_link_out_of_the_collection_is_refused(animals, tmp_path):
    (animals / CORRECTIONS).symlink_to(tmp_path / "elsewhere")
    for use in (read_corrections, append_corrections):
        with refuses("link out of the collection"):
            use(animals, Unused())
    assert not (tmp_path / "elsewhere").exists()


def test_what_cannot_be_read_is_an_error_and_is_not_appended_to(tmp_path):
    (file := tmp_path / CORRECTIONS).write_bytes(content := "{}\n".encode("utf-16"))
    desk, line, other = Desk(tmp_path), decide("a.png", "cat", "dog"), decide("a.png", "cat", "bird", by="b")
    with refuses(r"^data\.corrections: .*UTF-16"):
        read_corrections(tmp_path, Unused())
    assert desk.sync()[1].startswith("data.corrections: ")
    decisions, fault = desk.sync([line])
    assert "1 decisions wait" in fault and list(decisions.values()) == [[line]] and file.read_bytes() == content
    file.unlink()
    append_corrections(tmp_path, [other])
    assert desk.sync()[1] == "" and read_corrections(tmp_path, Unused())["a.png", "label"] == [other, line]
