"""Features are a network's own, kept by weights and image; whose they are is said, and if it has seen the labels."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from data.images.prepare import preparer
from data.load import load_collection
from engine.frozen.choose import PIXELS, choose_frozen
from engine.frozen.features import read_features
from engine.update.runtime import choose_runtime
from models.predictor import Predictor
from tests.in_process import TINY, configure, make_images, run
from tests.support import data_config, refuses
from tests.test_weights_commands import RESNET, fill_cache


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with images, and with a cache of the hub that has the weights of a small network."""
    monkeypatch.chdir(tmp_path)
    fill_cache(monkeypatch, tmp_path, RESNET, timm.create_model(RESNET))
    make_images(tmp_path / "images")
    return tmp_path


def open_parts(place):
    config = data_config(root=str(place / "images"))
    runtime = choose_runtime(configure("finetune", [*TINY, "data.root=images"])[0].runtime)
    return config, load_collection(config), runtime


def test_only_new_and_changed_images_are_read(place, monkeypatch):
    config, collection, runtime = open_parts(place)
    frozen = choose_frozen(None, collection, runtime, "weights")
    rows = np.flatnonzero(collection.weights())[::-1]
    with torch.inference_mode():
        features, found = read_features(frozen, collection, config, rows, runtime)
    assert found.tolist() == rows.tolist()
    files = [Path(collection.root) / collection.row(int(row)).path for row in rows]
    for row in (0, 5, 11):
        image = preparer(frozen.predictor.preprocessing, 10**6)(files[row].read_bytes(), "x")
        assert np.allclose(frozen.predictor.embed(image[None])[0], features[row], atol=1e-5)
    embedded, embed = [], Predictor.embed
    monkeypatch.setattr(Predictor, "embed", lambda self, images: embedded.append(len(images)) or embed(self, images))
    again, _ = read_features(frozen, collection, config, rows, runtime)
    assert torch.equal(again, features) and embedded == []
    files[3].write_bytes(files[8].read_bytes())
    os.utime(files[3], (1, 1))
    files[4].write_bytes(b"no image")
    changed, found = read_features(frozen, collection, config, rows, runtime)
    assert embedded == [2] and found.tolist() == np.delete(rows, 4).tolist()
    assert torch.allclose(changed[3], features[8], atol=1e-5)
    other = frozen._replace(version="other weights")
    monkeypatch.setattr("engine.frozen.features._BATCH", 4)
    few, found = read_features(other, collection, config, rows, runtime, deadline=0.0)
    assert len(few) == 4 and found.tolist() == rows[:4].tolist()
    for file in files:
        file.write_bytes(b"no image")
    with refuses("^data.root: .*no image"):
        read_features(frozen, collection, config, rows, runtime)


@pytest.mark.parametrize(
    ("device", "name"), [("cpu", "convnext_nano.in12k_ft_in1k"), ("cuda", "convnext_tiny.in12k_ft_in1k")]
)
def test_the_strongest_cached_network_that_suits_the_device_is_taken(place, monkeypatch, device, name):
    _, collection, runtime = open_parts(place)
    names = [RESNET, "convnext_tiny.in12k_ft_in1k", "convnext_nano.in12k_ft_in1k"]
    monkeypatch.setattr("engine.frozen.choose.list_weights", lambda *_: names)
    monkeypatch.setattr("engine.frozen.choose.open_frozen_timm", lambda name, runtime: PIXELS._replace(says=name))
    assert choose_frozen(None, collection, replace(runtime, device=torch.device(device)), "weights").says == name


def test_a_network_that_has_not_seen_the_labels_is_chosen_and_said(place, monkeypatch, log):
    _, collection, runtime = open_parts(place)
    choose_frozen(None, collection, runtime, "weights")
    assert f"{RESNET} at 96 px, which has never seen these labels" in log.text
    (place / f"hub/models--timm--{RESNET}/snapshots/0/model.safetensors").write_bytes(b"damaged")
    assert choose_frozen(None, collection, runtime, "weights") is PIXELS
    assert f"{RESNET} is skipped" in log.text
    images = f"data.root={place}/images"
    run("pretrain_fcmae", [*TINY, images, "task.decoder_dim=16", "run_dir=outputs/blind"], place)
    run("finetune", [*TINY, images, "run_dir=outputs/seen"], place)
    frozen = choose_frozen(None, collection, runtime, "weights")
    assert "outputs/blind" in frozen.says and "has not seen these labels" in frozen.says
    assert "may have trained on these labels" in choose_frozen("outputs/seen", collection, runtime, "weights").says
    make_images(place / "others")
    others = load_collection(data_config(root=str(place / "others")))
    assert "has not seen these labels" in choose_frozen("outputs/seen", others, runtime, "weights").says
    assert choose_frozen(None, others, runtime, "weights") is PIXELS
    with refuses("^weights: "):
        choose_frozen("nothing", others, runtime, "weights")
