"""The loader: named sets equal to torchvision's and the published crop, matched resolutions, content as identity."""

import gzip
import hashlib
import os
import pickle
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_files import (
    chw,
    cropped,
    load,
    noise_picture,
    noise_values,
    put,
    read_all,
    save,
    save_array,
    write_mnist,
)
from PIL import Image

import datasets
from basics import image_sets
from basics.console import UserError
from basics.pixels import crop, resize_bilinear

ROOT = Path(__file__).parent.parent


# ------------------------------------------------------------------------------------------------ ways to name a source


def test_a_path_wins_over_a_name_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "data", "MNIST")
    assert len(load("mnist", data_root=tmp_path / "data")) == 19
    save(tmp_path / "mnist" / "own.png")
    images = load("mnist", data_root=tmp_path / "data")
    assert images.labels == ["own.png"]
    line = f"'mnist' is taken for {tmp_path}/mnist; rename that to have the data set of this name"
    assert line in capsys.readouterr().out
    put(tmp_path, "data/FFHQ/test/1.png", "data/FFHQ/train/2.png")
    monkeypatch.chdir(tmp_path / "data")  # where the named sets lie: their folders are not the user's own
    assert load("FFHQ", data_root=".").labels == ["1.png"]
    assert len(load("MNIST", data_root=tmp_path / "data")) == 19


def test_the_home_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "data" / "FFHQ" / "test" / "1.png")
    (tmp_path / "list.txt").write_text("~/pictures/b.png\n")
    np.save(tmp_path / "p.npy", np.zeros((5, 32, 32), np.uint8))
    for source, count in (("~/pictures", 7), ("~/list.txt", 1), ("~/p.npy", 5), ("~/pictures/b.png", 1)):
        assert len(load(source)) == count
    assert len(load("FFHQ", data_root="~/data")) == 1


def test_one_picture_is_a_set(folder):
    images = load(folder / "b.png")
    assert (images.name, len(images), images.labels) == ("b", 1, [str(folder / "b.png")])
    assert torch.equal(read_all(images), cropped(0))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("CIFAR11", {}, "unknown data set 'CIFAR11'; choose one of: CIFAR10, .*LSUN; or give the path"),
        ("gone/pictures.npz", {}, "there is no file or folder 'gone/pictures.npz'; give a folder"),
        ("MNIST:digits", {}, "unknown data set"),
        ("gone.txt", {}, "unknown data set"),
        ("", {}, "unknown data set"),
        ("here", {"split": "validation"}, "choose one of: train, test"),
        ("here", {"num_channels": 4}, "3 channels or 1"),
        ("here", {"max_images": 0}, "at least 1"),
        ("here", {"image_size": 0}, "at least 1"),
        ("here", {}, "holds no images"),
        ("empty.txt", {}, "names no images"),
        ("binary.txt", {}, "cannot be read as text .*; save it as UTF-8"),
        ("table.csv", {}, "^table.csv is no image by its ending; give a folder of images, image file, .txt list"),
        ("gone_images.txt", {}, "was read as a list of .*, and none of these files is there; the first is 'gone.png'"),
        ("x" * 5000, {}, "unknown data set"),
        ("null\0byte", {}, "unknown data set"),
        ("pipe.png", {}, "^pipe.png is neither a file nor a folder, or leads to none; give a folder of images, image"),
        ("astray.npz", {}, "^astray.npz is neither a file nor a folder, or leads to none; give"),
    ],
)
def test_sources_that_cannot_be_loaded(source, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "here/notes.md", "table.csv")
    (tmp_path / "gone_images.txt").write_text("gone.png\n")
    (tmp_path / "empty.txt").write_text("\n# nothing\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff\x00")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "astray.npz").symlink_to("nowhere")
    with pytest.raises(UserError, match=message):
        load(source, **options)


# ----------------------------------------------------------------------------------------- identity: content, not names


def test_fingerprints_tell_contents_apart(memory, folder, tmp_path):
    first = load(folder).fingerprint
    assert first == load(folder, workers=1).fingerprint
    assert first.startswith("7:")
    folder.rename(tmp_path / "moved")  # what it is called is no content
    assert first == load(tmp_path / "moved").fingerprint
    (tmp_path / "moved").rename(folder)
    (folder / "f.png").rename(folder / "g.png")
    assert first == load(folder).fingerprint
    assert first != load(folder, max_images=6).fingerprint
    assert first != load(folder, image_size=16).fingerprint
    assert first != load(folder, center_crop=False).fingerprint
    save(folder / "b.png", 50, (41, 33))
    assert first != load(folder).fingerprint


def frames(folder, seed):
    """BMP pictures of equal names and sizes."""
    for index in range(3):
        save(folder / f"{index}.bmp", 10 * seed + index)
    return folder


def array_file(path, seed):
    return save_array(path, noise_values((3, 40, 33, 3), seed))


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(("make", "name"), [(frames, "pictures"), (array_file, "pictures.npy")])
def test_equal_names_and_sizes_are_no_identity(make, name, memory, check, tmp_path):
    first, second = (make(tmp_path / str(seed) / name, seed) for seed in (1, 2))
    same = make(tmp_path / "other" / f"x{name}", 1)
    marks = [load(source, check=check).fingerprint for source in (first, second, same)]
    assert marks[0] != marks[1]
    assert marks[0] == marks[2]  # the same content by another name


SAME_BYTES = {  # pairs of arrays that differ in nothing but what their bytes mean
    "types": (np.eye(40, dtype=np.uint8)[None], np.eye(40, dtype=bool)[None]),
    "shapes": (np.zeros((1, 40, 50), np.uint8), np.zeros((1, 50, 40), np.uint8)),
    "channels": (np.ones((1, 60, 40), np.uint8), np.ones((1, 40, 20, 3), np.uint8)),
}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(("first", "second"), SAME_BYTES.values(), ids=SAME_BYTES)
def test_equal_bytes_of_other_arrays_are_no_identity(first, second, check, on_demand, tmp_path):
    assert first.tobytes() == second.tobytes()
    paths = save_array(tmp_path / "first.npy", first), save_array(tmp_path / "second.npy", second)
    assert len({load(path, check=check).fingerprint for path in paths}) == 2


def test_labels_and_treatment_tell_what_was_used_and_how(folder, tmp_path):
    (folder / "b.png").write_bytes(b"damaged")
    used = ["a/b/y.png", "a/x.png", "c.PNG", "d.bmp", "e.png", "f.png"]
    images = load(folder)
    assert images.labels == used
    assert images.treatment == {
        "orientation": "as the camera noted", "transparency": "on white", "cut": None, "shape": "crop",
    }  # fmt: skip
    assert load(folder, center_crop=False, reduced_to=20).treatment["shape"] == "squeeze"
    save(tmp_path / "CelebA" / "0.png", 0, (178, 218))
    named = load("CelebA", data_root=tmp_path)
    assert (named.labels, named.treatment["cut"]) == (["0.png"], 140)
    assert (named.treatment["orientation"], named.treatment["transparency"]) == ("as stored", "dropped")
    assert load(array_file(tmp_path / "p.npy", 1)).labels is None


# ----------------------------------------------------------------------------------------------------------- named sets


@pytest.mark.parametrize(
    ("source", "name"),
    [("MNIST", "MNIST"), ("KMNIST", "KMNIST"), ("FashionMNIST", "FashionMNIST"), ("fashion_mnist", "FashionMNIST")],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_like_sets_are_torchvisions_resized_as_published(source, name, split, tmp_path):
    from torchvision.transforms import Resize

    pictures = write_mnist(tmp_path, name)[split]
    images = load(source, split=split, data_root=tmp_path)
    assert (images.name, images.shape, len(images)) == (name, (3, 32, 32), len(pictures))
    resize = Resize(32)  # on a PIL image, bilinear: what the published code calls
    expected = torch.stack([chw(resize(Image.fromarray(picture))) for picture in pictures])
    assert torch.equal(read_all(images), expected)


def write_cifar(root, name, monkeypatch):
    """CIFAR files of 4 training and 3 test images, under the names and (patched) checksums torchvision checks."""
    import torchvision

    made = getattr(torchvision.datasets, name)
    folder = root / made.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(file, count):
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = pickle.dumps({"data": data, "labels": [0] * count, "fine_labels": [0] * count})
        (folder / file).write_bytes(content)
        return [file, hashlib.md5(content).hexdigest()], data.reshape(-1, 3, 32, 32)

    train, train_pixels = write("train_part", 4)
    test, test_pixels = write("test_part", 3)
    meta, _ = write("meta", 1)
    monkeypatch.setattr(made, "train_list", [train])
    monkeypatch.setattr(made, "test_list", [test])
    content = pickle.dumps({made.meta["key"]: ["a class"]})
    (folder / "meta").write_bytes(content)
    monkeypatch.setattr(made, "meta", {**made.meta, "filename": meta[0], "md5": hashlib.md5(content).hexdigest()})
    return {"train": train_pixels, "test": test_pixels}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("reduced_to", [None, 20])
def test_named_sets_too_large_for_memory_are_enlarged_when_read(channels, reduced_to, tmp_path, monkeypatch):
    """As CIFAR-10 is at 256x256; resizing one image or all at once may round apart by one level."""
    write_mnist(tmp_path, "MNIST")
    write_cifar(tmp_path, "CIFAR10", monkeypatch)
    options = {"data_root": tmp_path, "image_size": 50, "num_channels": channels, "reduced_to": reduced_to}
    for source in ("MNIST", "CIFAR10"):
        monkeypatch.setattr(image_sets, "IN_MEMORY_BYTES", 2 << 30)
        kept = load(source, **options)
        monkeypatch.setattr(image_sets, "IN_MEMORY_BYTES", 0)
        made = load(source, **options)
        assert made.store.decode(0).nbytes <= channels * 50 * 50  # one image at a time
        assert (read_all(made).int() - read_all(kept).int()).abs().max() <= 1
        assert (made.source_size, made.reduced_to, made.shape) == (kept.source_size, kept.reduced_to, kept.shape)
        assert made.fingerprint == load(source, **options).fingerprint
        assert made.fingerprint != load(source, **{**options, "split": "train", "max_images": len(made)}).fingerprint


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar(name, split, tmp_path, monkeypatch):
    pixels = torch.from_numpy(write_cifar(tmp_path, name, monkeypatch)[split])
    images = load(name, split=split, data_root=tmp_path)
    assert images.name == name
    assert torch.equal(read_all(images), pixels)
    spread = pixels[[0, len(pixels) // 2]]
    assert torch.equal(read_all(load(name, split=split, data_root=tmp_path, max_images=2)), spread)


@pytest.mark.parametrize("split", ["train", "test"])
def test_svhn(split, tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    pixels = noise_values((5, 3, 32, 32))
    file = tmp_path / f"{split}_32x32.mat"
    savemat(file, {"X": pixels.transpose(2, 3, 1, 0), "y": np.ones((5, 1), np.uint8)})
    entry = [SVHN.split_list[split][0], file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", {**SVHN.split_list, split: entry})
    assert torch.equal(read_all(load("svhn", split=split, data_root=tmp_path)), torch.from_numpy(pixels))


def test_colour_sets_become_grey_as_pillow_does_it(tmp_path, monkeypatch):
    pixels = write_cifar(tmp_path, "CIFAR10", monkeypatch)["train"]
    expected = np.stack([np.array(Image.fromarray(image.transpose(1, 2, 0)).convert("L")) for image in pixels])
    grey = read_all(load("CIFAR10", split="train", data_root=tmp_path, num_channels=1))
    assert torch.equal(grey, torch.from_numpy(expected)[:, None])


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("name", [n for n, e in datasets.DATASETS.items() if isinstance(e, datasets._Torchvision)])
def test_a_failed_download_says_what_to_fetch_and_where_to(name, tmp_path, no_network):
    with pytest.raises(UserError, match="no route to host") as caught:
        load(name, data_root=tmp_path / "root")
    message = str(caught.value)
    entry = datasets.DATASETS[name]
    assert entry.url.format(split="test") in message
    assert str(tmp_path / "root" / entry.folder) in message
    assert "--data_root" in message
    assert "\n" not in message


def test_damaged_files_of_a_named_set(tmp_path, no_network):
    write_mnist(tmp_path, "MNIST")
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="deleting what is damaged"):
        load("MNIST", data_root=tmp_path)
    assert len(load("MNIST", split="train", data_root=tmp_path)) == 20


def test_the_files_fetched_by_hand_are_found_where_the_message_says(tmp_path, no_network, monkeypatch):
    from torchvision.datasets import KMNIST

    made = write_mnist(tmp_path, "KMNIST")
    resources = []
    for file in sorted((tmp_path / "KMNIST" / "raw").iterdir()):
        packed = file.with_name(file.name + ".gz")
        packed.write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
        resources.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))
    monkeypatch.setattr(KMNIST, "resources", resources)
    assert len(load("KMNIST", data_root=tmp_path)) == len(made["test"])


@pytest.mark.parametrize("shape", [(7, 28, 28), (7, 28, 28, 1)])
def test_arrays_of_28x28_are_treated_as_mnist_is(shape, tmp_path):
    pictures = write_mnist(tmp_path, "MNIST", count=8)["test"]
    np.savez_compressed(tmp_path / "pack.npz", images=pictures.reshape(shape))
    for size in [28, 32, 16]:
        packed = load(tmp_path / "pack.npz", image_size=size)
        assert packed.name == "pack"
        assert torch.equal(read_all(packed), read_all(load("MNIST", data_root=tmp_path, image_size=size)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("center_crop", [True, False])
def test_pictures_of_28x28_are_the_same_in_whatever_form_they_come(channels, mode, center_crop, tmp_path):
    """As files, in memory and in arrays, or scores of one form could not be judged by those of another."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (5, 28, 28, 3)[: 3 if mode == "L" else 4], dtype=np.uint8)
    pictures = [Image.fromarray(each) for each in values]
    (tmp_path / "files").mkdir()
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / "files" / f"{number}.png")
    np.savez(tmp_path / "array.npz", images=values)
    for size in (32, 28, 40, 20):
        options = {"image_size": size, "num_channels": channels, "center_crop": center_crop}
        forms = [tmp_path / "files", tmp_path / "array.npz", values, torch.from_numpy(values), pictures]
        first, *others = [read_all(datasets.load_any(form, **options)) for form in forms]
        for other in others:
            assert torch.equal(other, first)
    grey = read_all(
        datasets.load_any(np.stack([np.array(p.convert("L")) for p in pictures]), image_size=32, num_channels=1)
    )
    if channels == 1:
        options = {"image_size": 32, "num_channels": 1, "center_crop": center_crop}
        assert torch.equal(read_all(datasets.load_any(tmp_path / "files", **options)), grey)


# -------------------------------------------------------------------------------------------------- named sets of files

FILE_SETS = {"CELEBA": "CelebA", "celebahq": "CelebAHQ", "FFHQ": "FFHQ", "ImageNet": "ImageNet", "LSUN": "LSUN_tower"}
SIZE = (180, 220)


def save_noise(folder, *seeds, size=SIZE):
    """Pictures `{seed}.png` of noise."""
    for seed in seeds:
        save(folder / f"{seed}.png", seed, size)


def as_used(name, *seeds):
    """What a named set makes of pictures of noise, (N, 3, 32, 32)."""
    pictures = [noise_picture(seed, SIZE) for seed in seeds]
    if name == "CelebA":  # the central 140x140 pixels
        pictures = [picture.crop((20, 40, 160, 180)) for picture in pictures]
    return torch.stack([chw(crop(picture, 32)) for picture in pictures])


def lists(root, name):
    for split, seeds in {"train": [3, 1], "test": [2]}.items():
        save_noise(root / name / "all", *seeds)
        (root / f"{name}_{split}.txt").write_text("\n".join(f"{name}/all/{seed}.png" for seed in seeds))


def folders(root, name, test="test"):
    save_noise(root / name / "train" / "below", 1)
    save_noise(root / name / "train", 3)
    save_noise(root / name / test, 2)


def torchvision_folders(root, name):
    folders(root, name, "val")


@pytest.mark.parametrize("layout", [lists, folders, torchvision_folders])
@pytest.mark.parametrize("source", FILE_SETS)
def test_named_sets_of_files(source, layout, tmp_path):
    name = FILE_SETS[source]
    layout(tmp_path, name)
    for split, seeds in {"train": [3, 1], "test": [2]}.items():
        images = load(source, split=split, data_root=tmp_path, category="tower")
        assert (images.name, len(images)) == (name, len(seeds))
        assert torch.equal(read_all(images), as_used(name, *seeds))


@pytest.mark.parametrize("source", FILE_SETS)
def test_a_set_without_splits_serves_both_and_says_so(source, tmp_path, capsys):
    name = FILE_SETS[source]
    save_noise(tmp_path / name / "faces", 2)
    for split in ("train", "test"):
        images = load(source, split=split, data_root=tmp_path, category="tower")
        assert torch.equal(read_all(images), as_used(name, 2))
        assert f"{name} is not split: all images of {tmp_path / name} serve" in capsys.readouterr().err


@pytest.mark.parametrize("source", FILE_SETS)
def test_an_absent_set_says_what_to_put_where(source, tmp_path):
    name = FILE_SETS[source]
    options = {"data_root": tmp_path, "category": "tower"}
    with pytest.raises(UserError, match=rf"the test split of {name} is not in {tmp_path}: put ") as caught:
        load(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith("or give another folder with --data_root")
    assert ("img_align_celeba/ and list_eval_partition.txt" in message) == (name == "CelebA")
    places = [tmp_path / f"{name}_test.txt", tmp_path / name / "test", tmp_path / name]
    for place in places:
        assert f"{place}," in message or f"{place} " in message
    save_noise(places[1], 2)  # as the message says
    assert len(load(source, **options)) == 1
    with pytest.raises(UserError, match="the train split of"):
        load(source, split="train", **options)  # the test images must not be trained on


def test_training_images_are_never_taken_for_test_images(tmp_path):
    lists(tmp_path, "FFHQ")  # the list is of a folder that would do for a set without splits
    (tmp_path / "FFHQ_test.txt").unlink()
    with pytest.raises(UserError, match="the test split of FFHQ"):
        load("FFHQ", data_root=tmp_path)
    assert len(load("FFHQ", split="train", data_root=tmp_path)) == 2


def test_a_set_known_by_name_differs_from_its_folder(tmp_path, on_demand):
    """By the cut that CelebA's name brings, also in its fingerprint; without the crop there is no cut either."""
    save_noise(tmp_path / "CelebA", 2)
    named, folder = load("CelebA", data_root=tmp_path), load(tmp_path / "CelebA")
    assert named.name == folder.name
    assert not torch.equal(read_all(named), read_all(folder))
    assert named.fingerprint != folder.fingerprint
    sources = (tmp_path / "CelebA", "celeba")
    whole = [read_all(load(source, data_root=tmp_path, center_crop=False)) for source in sources]
    assert torch.equal(*whole)


def test_pictures_smaller_than_the_cut(tmp_path):
    save_noise(tmp_path / "CelebA", 2, size=(64, 80))
    assert torch.equal(read_all(load("CelebA", data_root=tmp_path))[0], chw(crop(noise_picture(2, (64, 80)), 32)))


def write_celeba(root):
    """CelebA as published and as torchvision reads it: pictures 1 to 6, in the splits 0, 1, 2, 0, 1, 2."""
    folder = root / "celeba"
    names = [f"{seed}.png" for seed in range(1, 7)]
    save_noise(folder / "img_align_celeba", *range(1, 7), size=(178, 218))
    (folder / "list_eval_partition.txt").write_text("".join(f"{n} {i % 3}\n" for i, n in enumerate(names)))
    for file in ("identity_CelebA.txt", "list_bbox_celeba.txt", "list_landmarks_align_celeba.txt"):
        header = "" if file.startswith("identity") else "6\nvalue\n"
        (folder / file).write_text(header + "".join(f"{n} 1\n" for n in names))
    (folder / "list_attr_celeba.txt").write_text("6\nvalue\n" + "".join(f"{n} 1\n" for n in names))


@pytest.mark.parametrize("split", ["train", "test"])
def test_celeba_as_published_is_torchvisions(split, tmp_path, monkeypatch):
    from torchvision.datasets import CelebA
    from torchvision.transforms import CenterCrop

    write_celeba(tmp_path)
    monkeypatch.setattr(CelebA, "_check_integrity", lambda self: True)  # of the real files
    theirs = CelebA(str(tmp_path), split, transform=CenterCrop(140))
    images = load("CELEBA", split=split, data_root=tmp_path)
    assert images.name == "CelebA"
    assert torch.equal(read_all(images), torch.stack([chw(crop(picture, 32)) for picture, _ in theirs]))


def test_a_damaged_partition_of_celeba(tmp_path):
    write_celeba(tmp_path)
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("1.png\n2.png one\n")
    with pytest.raises(UserError, match=r"list_eval_partition\.txt names no image of the test split; copy it again"):
        load("CelebA", data_root=tmp_path)


def test_categories_of_lsun(tmp_path):
    save_noise(tmp_path / "LSUN_church_outdoor" / "test", 1, 2)
    for source, category in [("LSUN", "church_outdoor"), ("lsun:church_outdoor", None), ("LSUN:church_outdoor", "x")]:
        images = load(source, category=category, data_root=tmp_path)
        assert (images.name, len(images)) == ("LSUN_church_outdoor", 2)
    for source in ("LSUN", "LSUN:", "LSUN:../x"):
        with pytest.raises(UserError, match=f"'{source}' names no category of LSUN; write LSUN:bedroom, or set config"):
            load(source, data_root=tmp_path)


# -------------------------------------------------------------------------------------------------- matched resolutions


def smooth(count, size, seed=0):
    """Images (N, size, size, 3) uint8 whose detail grows with the size: noise at every scale from 4 pixels on."""
    rng = np.random.default_rng(seed)
    images = np.zeros((count, size, size, 3))
    for cells in (4, 8, 16, 32, 64):
        images += np.kron(rng.normal(0, 16, (count, cells, cells, 3)), np.ones((1, size // cells, size // cells, 1)))
    return (images + 128).clip(0, 255).astype(np.uint8)


def mean_of_blocks(images, edge):
    """Images (N, H, W, C) uint8 at a lower resolution, as a sensor of larger pixels sees them."""
    count, size, _, channels = images.shape
    blocks = images.reshape(count, edge, size // edge, edge, size // edge, channels)
    return blocks.mean((2, 4)).round().astype(np.uint8)


def sharpness(images):
    """(N,) mean squared difference of neighbouring pixels of (N, C, H, W)."""
    images = images.float()
    return (images.diff(dim=2).square().mean((1, 2, 3)) + images.diff(dim=3).square().mean((1, 2, 3))).numpy()


def write_files(path, images):
    path.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(path / f"{index:02}.png")
    return path


@pytest.mark.parametrize(("write", "ending"), [(save_array, ".npy"), (write_files, "")])
def test_matched_images_are_equally_sharp(write, ending, memory, tmp_path):
    scenes = smooth(40, 64)
    low = write(tmp_path / f"low{ending}", mean_of_blocks(scenes, 16))
    high = write(tmp_path / f"high{ending}", mean_of_blocks(scenes, 32))
    assert (load(low).source_size, load(high).source_size) == (16, 32)
    ratio = sharpness(read_all(load(low))) / sharpness(read_all(load(high)))
    assert ratio.max() < 0.5  # resizing one side alone tells every pair apart
    matched = [load(source, reduced_to=16) for source in (low, high)]
    ratio = sharpness(read_all(matched[0])) / sharpness(read_all(matched[1]))
    assert abs(ratio - 1).max() < 0.02  # 0.005 seen: block means are not quite Pillow's filters
    assert [images.reduced_to for images in matched] == [16, 16]


def test_images_go_the_same_way_from_every_kind_of_source(tmp_path):
    pictures = write_mnist(tmp_path, "MNIST", count=8)["test"]
    np.save(tmp_path / "array.npy", pictures)
    write_files(tmp_path / "files", pictures)
    (tmp_path / "list.txt").write_text("\n".join(f"files/{i:02}.png" for i in range(len(pictures))))
    for reduced_to in (28, 20, 14):
        expected = read_all(load("MNIST", data_root=tmp_path, reduced_to=reduced_to))
        small = torch.stack([chw(crop(Image.fromarray(picture), reduced_to)) for picture in pictures])
        assert torch.equal(expected, resize_bilinear(small, 32))
        for source in ("array.npy", "files", "list.txt"):
            made = read_all(load(tmp_path / source, reduced_to=reduced_to))
            assert (made.int() - expected.int()).abs().max() <= 1  # resizing one image or all at once may round apart
        assert torch.equal(
            read_all(load("MNIST", data_root=tmp_path, reduced_to=reduced_to, num_channels=1)), expected[:, :1]
        )


def test_colour_sets_are_matched_too(tmp_path, monkeypatch):
    pixels = write_cifar(tmp_path, "CIFAR10", monkeypatch)["test"]
    images = load("CIFAR10", data_root=tmp_path, reduced_to=28)
    cropped = torch.stack([chw(crop(Image.fromarray(image.transpose(1, 2, 0)), 28)) for image in pixels])
    assert torch.equal(read_all(images), resize_bilinear(cropped, 32))
    assert (images.source_size, images.reduced_to) == (32, 28)


def test_squeezed_images_are_matched_squeezed(tmp_path):
    picture = noise_picture(0, (70, 50))
    write_files(tmp_path / "p", [np.array(picture)])
    small = chw(picture.resize((20, 20), Image.Resampling.BICUBIC))
    expected = resize_bilinear(small[None], 32)
    assert torch.equal(read_all(load(tmp_path / "p", center_crop=False, reduced_to=20)), expected)


def test_the_source_size_is_the_smallest_edge_of_a_used_image(memory, tmp_path):
    for index, size in enumerate([(60, 90), (50, 41), (300, 45), (9, 9)]):
        save(tmp_path / f"{index}.png", index, size)
    Image.new("F", (4, 4)).save(tmp_path / "1a.tiff")  # unusable
    assert load(tmp_path, max_images=3).source_size == 41
    assert load(tmp_path).source_size == 9
    save(tmp_path / "CelebA" / "0.png", 0, (178, 218))
    assert load("CelebA", data_root=tmp_path).source_size == 140  # its cut
    assert load("CelebA", data_root=tmp_path, center_crop=False).source_size == 178


def test_what_images_were_reduced_to_is_in_their_fingerprint(memory, folder):
    assert len({load(folder, reduced_to=reduced_to).fingerprint for reduced_to in (None, 20, 21)}) == 3


# ------------------------------------------------------------------------------------------------------ what is shipped


@pytest.mark.parametrize("name", ["fashion_mnist", "mnist"])
def test_the_demo_images_load(name):
    images = load(ROOT / "demo" / f"{name}.npz")
    assert (images.name, len(images), images.shape) == (name, 256, (3, 32, 32))
    pixels = read_all(images).float()
    assert pixels[:, :, 0].mean() < 20  # drawn on black
    assert 20 < pixels.mean() < 100
