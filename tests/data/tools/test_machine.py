"""job=machine: what it finds, and that it refuses what a training would."""

from tests.in_process import run
from tests.support import refuses


def test_a_machine_is_described(tmp_path, log, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("data.tools.machine.distributions", lambda name: [name] * (name != "nicegui"))
    assert run("prepare", ["job=machine"], tmp_path) == "nothing that a training would refuse"
    found = dict(message.partition(": ")[::2] for message in log.messages)
    assert found.keys() >= {"cpu", "torch.compile", "decoders", "outputs", "runtime.precision=auto"}
    assert found["runtime.precision=auto"].split(": ")[0].split()[-1] in ("bf16", "fp32")
    assert "images/s" in found["fp32"] and "images/s" in found["bf16"]
    assert not {"tf32", "fp16"} & found.keys()  # for GPUs
    assert found["requirements.txt"] == "installed" and "nicegui" in found["requirements-view.txt"]


def test_all_that_a_training_would_refuse_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CXX", "nope")
    (tmp_path / "file").touch()
    words = ["job.device=cuda", "job.precision=fp16", "job.compile=true", "job.run_dir=file"]
    with refuses("refused") as refused:
        run("prepare", ["job=machine", *words, "data=image_folder", "data.root=nowhere"], tmp_path)
    keys = [line.split(":")[0].strip() for line in str(refused.value).splitlines()[1:]]
    assert keys == ["runtime.device", "runtime.precision", "runtime.compile", "data.root", "run_dir"]
