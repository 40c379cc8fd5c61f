"""job=machine: what it finds, and that it refuses what a training would."""

import json

import pytest

from tests.in_process import run
from utils.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("utils.hardware._SPEED_SEC", 0.01)


def test_a_machine_is_described(tmp_path, monkeypatch):
    monkeypatch.setattr("data.tools.machine.FORMATS", ("PNG", "NONE"))
    monkeypatch.setattr("data.tools.machine.version", lambda name: "1.5.0" if name == "diffusers" else "999")
    assert run("prepare", ["job=machine"], tmp_path).startswith("nothing that a training would refuse")
    report = json.loads((tmp_path / "outputs/care/machine/machine.json").read_text())
    assert {"cpu fp32", "cpu bf16", "cpu fp16"} <= report["figures"].keys() and min(report["figures"].values()) > 0
    found = {row["what"]: row["found"] for row in report["tables"]["machine"]}
    assert found["decoders"].endswith("cannot read NONE") and "torch<" in found["requirements.txt"]
    assert "diffusers<0.45,>=0.38 (here: 1.5.0)" in found["requirements-sdxl.txt"]
    assert found["runtime.precision=auto"].split()[-1] in ("bf16", "fp32")
    assert "GiB free" in found["disk of job.run_dir"] and found["matrix products, cpu fp32"].endswith(" GFLOPS")


def test_all_that_a_training_would_refuse_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CXX", "nope")
    (tmp_path / "file").touch()
    words = ["job.device=cuda", "job.precision=fp16", "job.compile=true", "job.run_dir=file"]
    with pytest.raises(UserError, match="refused") as refused:
        run("prepare", ["job=machine", *words, "data=image_folder", "data.root=nowhere"], tmp_path)
    keys = [line.split(":")[0].strip() for line in str(refused.value).splitlines()[1:]]
    assert keys == ["runtime.device", "runtime.precision", "runtime.compile", "data.root", "run_dir"]
