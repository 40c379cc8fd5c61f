"""A tagger's exports in imgutils (dghs-imgutils 0.19.0), unchanged and offline, in an environment of its own
(`make install-interop`): the same tags as the network itself gives in PyTorch.
"""

import json
import subprocess

import pytest

from tests.models import test_wd14_tools as tools
from tests.support import ROOT
from utils.formats.spelling import CHARACTER, GENERAL, RATING

place, wanted = tools.place, tools.wanted
INTEROP = ROOT / ".venv-interop/bin/python"
PROGRAM = """
import json, sys
import numpy as np
from imgutils.tagging import convert_wd14_emb_to_prediction, get_wd14_tags
found = []
for path in sys.argv[1:]:
    forms = ("rating", "general", "character")
    wd14, embedding = get_wd14_tags(path, model_name="ViT_v3", fmt=(forms, "embedding"))
    again = convert_wd14_emb_to_prediction(np.asarray(embedding), model_name="ViT_v3")
    found.append({"wd14": wd14, "again": again})
print(json.dumps(found))
"""


def make_hub(exports, folder):
    """Lay the exports out as the cache of the hub, as if they had been downloaded."""
    published = {
        "deepghs/wd14_tagger_with_embeddings": "SmilingWolf/wd-vit-tagger-v3", "SmilingWolf/wd-vit-tagger-v3": "."
    }  # fmt: skip
    for repository, inside in published.items():
        home = folder / f"hub/models--{repository.replace('/', '--')}"
        snapshot = home / "snapshots" / ("0" * 40) / inside
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        (home / "refs").mkdir()
        (home / "refs/main").write_text("0" * 40)
        snapshot.resolve().symlink_to(exports / "repo")


@pytest.fixture(scope="module")
def imgutils(place, tmp_path_factory):
    if not INTEROP.exists():
        pytest.skip("imgutils is not installed: make install-interop")
    folder = tmp_path_factory.mktemp("hub")
    make_hub(place, folder)
    environment = {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    command = [INTEROP, "-c", PROGRAM, *(place / f"{number}.png" for number in range(len(tools.IMAGES)))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_imgutils_finds_our_tags_in_a_wd14_file(imgutils, wanted):
    found = [set(general) | set(character) for _, general, character in (one["wd14"] for one in imgutils)]
    ours = [
        {name for _, name in tools.passed(probs, lambda key: 0.85 if key[0] == CHARACTER else 0.35)} for probs in wanted
    ]
    tools.assert_like(found, ours)
    rating, general, _ = imgutils[0]["wd14"]
    assert list(rating) == ["general", "sensitive", "questionable", "explicit"] and rating["sensitive"] == 0.0
    assert rating["explicit"] == pytest.approx(wanted[0][RATING, "explicit"], abs=1e-4)
    assert general == pytest.approx({name: wanted[0][GENERAL, name] for name in general}, abs=1e-4)
    for again, direct in zip(imgutils[0]["again"], imgutils[0]["wd14"], strict=True):  # from its embedding
        assert again == pytest.approx(direct, abs=1e-4)
