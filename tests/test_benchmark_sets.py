"""The image files that benchmarks are run on: which images, as they are stored, and nothing where some are missing."""

import numpy as np
import pytest
from picture_files import noise_values, write_mnist

from basics.console import UserError
from benchmarks import held_out, table_sets


def read(path):
    with np.load(path) as file:
        return file["images"]


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Fashion-MNIST, MNIST and a sample for CIFAR-10, of which 12 and 9 images are to learn from."""
    monkeypatch.setattr(table_sets, "FASHION_FIT", 12)
    monkeypatch.setattr(table_sets, "CIFAR_FIT", 9)
    made = {name: write_mnist(tmp_path / "data", name, classes=10) for name in ("FashionMNIST", "MNIST")}
    sample = noise_values((14, 32, 32, 3), 7)
    np.savez(tmp_path / "sample.npz", test=sample)
    return made["FashionMNIST"], made["MNIST"], sample


def write_tables(folder, images):
    flags = {"data_root": folder / "data", "cifar10": f"{folder / 'sample.npz'}:test", "images": images}
    table_sets.main([f"--{name}={value}" for name, value in flags.items()] + [f"--folder={folder / 'table'}"])


def test_tables_are_of_the_first_images_of_test_splits(sets, tmp_path):
    fashion, mnist, sample = sets
    write_tables(tmp_path, 5)
    expected = {
        "fashion_fit": fashion["test"][:12],
        "fashion_in": fashion["test"][12:17],
        "fashion": fashion["test"][:5],
        "mnist": mnist["test"][:5],
        "cifar": sample[:5],
        "cifar_fit": sample[:9],
        "cifar_in": sample[9:],
    }
    assert {path.stem for path in (tmp_path / "table").iterdir()} == set(expected)
    for name, images in expected.items():
        assert np.array_equal(read(tmp_path / "table" / f"{name}.npz"), images), name


@pytest.mark.parametrize(("images", "message"), [(8, "20 are needed"), (6, "15 are needed")])
def test_too_few_images_leave_nothing_behind(images, message, sets, tmp_path):
    with pytest.raises(UserError, match=message):
        write_tables(tmp_path, images)
    assert not (tmp_path / "table").exists()


def test_no_images_are_refused(sets, tmp_path, capsys):
    with pytest.raises(SystemExit):
        write_tables(tmp_path, 0)
    assert "argument --images: '0' is no whole number from 1 on" in capsys.readouterr().err
    assert not (tmp_path / "table").exists()


def test_footwear_is_held_out_of_both_splits(tmp_path):
    made = write_mnist(tmp_path / "data", "FashionMNIST", classes=10)
    held_out.main(["--data_root", str(tmp_path / "data"), "--folder", str(tmp_path / "made")])
    files = {"clothes_train": ("train", False), "clothes": ("test", False), "shoes": ("test", True)}
    for name, (split, footwear) in files.items():
        labels = np.arange(len(made[split])) % 10
        expected = made[split][np.isin(labels, [5, 7, 9]) == footwear]
        assert np.array_equal(read(tmp_path / "made" / f"{name}.npz"), expected)
