"""Compiled runs with channels-last, bf16, an average and two ranks: the names in their files, and an eager resume."""

import pytest
from safetensors.torch import load_file

from engine.runtime import missing_for_compile
from tests.support import SCRIPTS, checkpoint_tensors, common, run, start

pytestmark = pytest.mark.skipif(missing_for_compile("cpu"), reason="needs a C++ compiler and Python's headers")
FAST = ["runtime.compile=true", "runtime.channels_last=true", "runtime.precision=bf16", "runtime.deterministic=false"]


@pytest.mark.ddp
def test_a_compiled_run_on_two_ranks_leaves_the_files_of_an_eager_one(collection, tmp_path, task="fcmae"):
    settings = ["loop.total_steps=4", "loop.global_batch_size=8", "loop.ema_decay=0.9", "loop.checkpoint_every_steps=4"]
    compiled = common(task, collection, tmp_path / "compiled", *settings, *FAST)
    started = start(SCRIPTS[task], compiled, tmp_path, ranks=2)
    assert started.wait(500) == [0, 0], started.output[-3000:]
    assert "compiling" in started.output
    run(SCRIPTS[task], common(task, collection, tmp_path / "eager", *settings), tmp_path)

    found, expected = (checkpoint_tensors(tmp_path / name, 4) for name in ("compiled", "eager"))
    assert found.keys() == expected.keys()
    assert all(
        found[name].shape == tensor.shape and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    for file in sorted((tmp_path / "eager/weights").glob("*.safetensors")):
        assert load_file(tmp_path / "compiled/weights" / file.name).keys() == load_file(file).keys()
    run("evaluate.py", [f"run_dir={tmp_path}/compiled", "weights=ema", "runtime.threads=1"], tmp_path)
    # An eager float32 rank goes on from it.
    more = [text for text in compiled if text not in FAST and not text.startswith("loop.total_steps")]
    allowed = ["loop.total_steps=6", "resume_allow=[runtime.precision,runtime.deterministic]"]
    assert "at step 4" in run(SCRIPTS[task], [*more, *allowed], tmp_path)
