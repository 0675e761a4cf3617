"""Fixtures of several test modules."""

import pytest
import tiny
from picture_files import save

from basics import image_sets
from basics.image_lists import say_once


@pytest.fixture
def folder(tmp_path):
    """Seven pictures in a folder and folders below it."""
    for index, name in enumerate(["b.png", "a/x.png", "c.PNG", "a/b/y.png", "d.bmp", "e.png", "f.png"]):
        save(tmp_path / "pictures" / name, index)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory):
    """A calibrated detector, not to be changed; the checkpoint that it was made from is gone."""
    return tiny.write_detector(tmp_path_factory.mktemp("detector") / "mine")


@pytest.fixture(autouse=True)
def nothing_was_said():
    """What is told once a run is told in every test."""
    say_once.cache_clear()


@pytest.fixture
def on_demand(monkeypatch):
    """No set of images is small enough to be kept."""
    monkeypatch.setattr(image_sets, "IN_MEMORY_BYTES", 0)


@pytest.fixture(params=[0, 2 << 30], ids=["on demand", "in memory"])
def memory(request, monkeypatch):
    """Bytes up to which sets of images are kept: none are, or all."""
    monkeypatch.setattr(image_sets, "IN_MEMORY_BYTES", request.param)
    return request.param
