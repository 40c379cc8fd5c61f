"""A tagger's exports in imgutils (dghs-imgutils 0.19.0), unchanged and offline, in an environment of its own
(`make install-interop`): the same tags as the network itself gives in PyTorch.
"""

import json
import shutil
import subprocess

import pytest

from tests.models import test_wd14_tools as tools
from tests.support import ROOT, export
from utils.formats.vocabulary import CHARACTER, GENERAL, RATING

place, wanted = tools.place, tools.wanted
INTEROP = ROOT / ".venv-interop/bin/python"
PROGRAM = """
import json, sys
import numpy as np
from imgutils.generic import multilabel_timm_predict
from imgutils.tagging import convert_wd14_emb_to_prediction, get_wd14_tags
found = []
for path in sys.argv[1:]:
    forms = ("rating", "general", "character")
    wd14, embedding = get_wd14_tags(path, model_name="ViT_v3", fmt=(forms, "embedding"))
    again = convert_wd14_emb_to_prediction(np.asarray(embedding), model_name="ViT_v3")
    every = multilabel_timm_predict(path, repo_id="me/every", fmt="tag")
    found.append({"wd14": wd14, "again": again, "every": every})
print(json.dumps(found))
"""


def make_hub(exports, folder):
    """Lay the exports out as the cache of the hub, as if they had been downloaded."""
    published = {"deepghs/wd14_tagger_with_embeddings": "SmilingWolf/wd-vit-tagger-v3",
                 "SmilingWolf/wd-vit-tagger-v3": ".", "me/every": "."}  # fmt: skip
    for repository, inside in published.items():
        home = folder / f"hub/models--{repository.replace('/', '--')}"
        snapshot = home / "snapshots" / ("0" * 40) / inside
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        (home / "refs").mkdir()
        (home / "refs/main").write_text("0" * 40)
        snapshot.resolve().symlink_to(exports / ("imgutils" if repository == "me/every" else "repo"))


@pytest.fixture(scope="module")
def imgutils(place, tmp_path_factory):
    """Return what imgutils finds in each image."""
    if not INTEROP.exists():
        pytest.skip("imgutils is not installed: make install-interop")
    folder = tmp_path_factory.mktemp("hub")
    export("imgutils", *tools.make_tagger(), place / "imgutils", thresholds=tools.THRESHOLDS)
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


def test_imgutils_takes_each_tags_own_threshold_from_the_general_format(imgutils, wanted):
    ours = [
        {name for category, name in tools.KEYS if probs[category, name] >= tools.LEAST[category, name]}
        for probs in wanted
    ]
    tools.assert_like([set(one["every"]) for one in imgutils], ours)


@pytest.mark.parametrize("form, least_of", [("imgutils", tools.LEAST.get), ("cl_tagger", lambda key: 0.35)])
def test_the_program_in_the_readme_prints_our_tags(form, least_of, place, wanted, tmp_path):
    export(form, *tools.make_tagger(), tmp_path, thresholds=tools.THRESHOLDS)
    shutil.copy(place / "0.png", tmp_path / "image.png")
    ours = {key[1]: prob for key, prob in wanted[0].items() if prob >= least_of(key)}
    assert tools.run_program(tmp_path) == pytest.approx(ours, abs=1e-3) and len(ours) > 20
