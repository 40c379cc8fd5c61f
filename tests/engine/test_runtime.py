"""Whether torch.compile is to be had: literal cases of compiler, headers and Triton, and the refusals."""

import pytest

from engine.config import RuntimeConfig
from engine.runtime import COMPILE_PAYS_AFTER_STEPS, can_compile, choose_compile, missing_for_compile
from utils.errors import UserError

CONFIG = RuntimeConfig(
    device="cpu", precision="fp32", compile="auto", channels_last=False, workers=0, prefetch_batches=1, threads=1,
    deterministic=False, sync_batchnorm=False, grad_checkpointing=False, parallel="ddp", hang_timeout_sec=60.0,
)  # fmt: skip


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Give the machine these programs, headers and variables, and nothing else."""

    def make(programs=(), headers="include", triton=True, **variables):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in programs:
            (folder / name).touch(mode=0o755)
        monkeypatch.setenv("PATH", str(folder))
        for name in ("CC", "CXX"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        if headers is not None:
            (tmp_path / headers).mkdir()
            (tmp_path / headers / "Python.h").touch()
        schemes = {"default": str(tmp_path / "include"), "posix_prefix": str(tmp_path / "prefix")}
        monkeypatch.setattr("engine.runtime.sysconfig.get_path", lambda _, scheme="default": schemes[scheme])
        monkeypatch.setattr("engine.runtime.find_spec", lambda name: object() if triton else None)
        monkeypatch.setattr("engine.runtime.sys.platform", "linux")

    return make


@pytest.mark.parametrize(
    ("device", "given", "missing"),
    [
        ("cpu", {"programs": ["g++"]}, []),
        ("cpu", {"programs": ["g++"], "headers": "prefix"}, []),
        ("cpu", {"programs": ["g++"], "headers": None}, ["headers"]),
        ("cpu", {}, ["a compiler on the PATH (g++)"]),
        ("cpu", {"programs": ["clang++"]}, ["a compiler on the PATH (g++)"]),  # inductor does not look for it
        ("cpu", {"programs": ["clang++"], "CXX": "clang++"}, []),
        ("cpu", {"programs": ["ccache", "g++"], "CXX": "ccache g++"}, []),
        ("cpu", {"programs": ["g++"], "CXX": "nope"}, ["the compiler that CXX names ('nope')"]),
        ("cpu", {"programs": ["g++"], "CXX": ""}, ["the compiler that CXX names ('')"]),
        ("cpu", {"headers": None, "CXX": "nope -O3"}, ["CXX names ('nope -O3')", "headers"]),
        ("cuda", {"programs": ["gcc"]}, []),
        ("cuda", {"programs": ["clang"]}, []),
        ("cuda", {"programs": ["g++"]}, ["a compiler on the PATH (gcc or clang)"]),
        ("cuda", {"programs": ["gcc"], "CC": "nope"}, ["the compiler that CC names ('nope')"]),
        ("cuda", {"programs": ["gcc"], "headers": None}, ["headers"]),
        ("cuda", {"programs": ["gcc"], "triton": False}, ["the package triton"]),
    ],
)
def test_what_is_missing_is_named(device, given, missing, machine):
    machine(**given)
    found = missing_for_compile(device)
    assert len(found) == len(missing) and all(wanted in text for wanted, text in zip(missing, found)), found
    assert can_compile(device) == (not missing)
    config = CONFIG.model_copy(update={"compile": True})
    if not missing:
        assert choose_compile(config, device, 1) is True
        return
    with pytest.raises(UserError) as refused:
        choose_compile(config, device, 1)
    message = f"runtime.compile: true needs {' and '.join(found)}, not found here; install that or set "
    assert str(refused.value) == message + "runtime.compile=auto"


@pytest.mark.parametrize("headers", ["include", None])
def test_auto_compiles_long_runs_where_that_can_be_had(headers, machine):
    machine(["g++"], headers)
    for steps, pays in ((COMPILE_PAYS_AFTER_STEPS["cpu"] - 1, False), (COMPILE_PAYS_AFTER_STEPS["cpu"], True)):
        assert choose_compile(CONFIG, "cpu", steps) == (pays and headers is not None)
    assert not choose_compile(CONFIG.model_copy(update={"deterministic": True}), "cpu", 10**6)
    assert not choose_compile(CONFIG.model_copy(update={"compile": False}), "cpu", 10**6)
