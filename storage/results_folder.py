"""The results folder of recon.py: its batches, which know what they were made from, and its manifest."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from pathlib import Path

import torch

from basics.console import UserError, counted
from basics.files import link, write_bytes, write_json
from basics.tensor_files import is_stored
from storage.arrays import differences
from storage.json_schema import (
    COUNT,
    FLAG,
    POSITIVE,
    TABLE,
    TEXT,
    check_fields,
    list_of,
    or_null,
    parse_json,
    table_of,
)
from storage.tensors import read_tensors, write_tensors

MANIFEST = "manifest.json"
FORMAT = 2  # of the manifest, and of batches that know what they were made from
MISSING = "is missing"
_INFORMATION = ("dataset", "skipped", "labels")  # of a side's entry: told, but not compared
SIDES = {"pos": "in-domain", "neg": "out-of-domain"}


@dataclasses.dataclass(frozen=True)
class ResultsFolder:
    """`{workdir}/{mask}_reps{R}` with `pos/batch_{i}.pth` and `neg/batch_{i}.pth`, as published, and `manifest.json`.

    A batch is a dict: `orig` (B, C, H, W) in [0, 1], `masked` a list of R tensors orig * mask, `recon` a list of R
    tensors, not clipped; and, which the published code does not read, `identity` (its index, images, repetitions and
    the hash of what it was made from, see `made_from`) and `digest` (of the identity and all pixels).

    The manifest is `{"format": 2, "settings": {...}, "sides": {"pos": {...}, "neg": {...}}, "versions": {...}}`;
    settings and the part of a side's entry that `_INFORMATION` does not name say everything that determines the side's
    batches.  Folders of the published code have no manifest, those of earlier versions one without a format; the
    batches of both have no identity, and are read all the same.

    Attributes:
        path: the folder.
        making: of a run that writes here, 'pos' and 'neg' -> `made_from`: a batch is written under no other manifest.
    """

    path: Path
    making: dict = dataclasses.field(default_factory=dict)

    def batch_path(self, side, index):
        """The file of batch `index` of 'pos' or 'neg'."""
        return self.path / side / f"batch_{index}.pth"

    def identity(self, side, index):
        """What the manifest says of a batch; None where it says nothing (published folders, earlier versions).

        Returns:
            dict: `index`, `images` and `repetitions`, and `made_from`.
        """
        manifest = self.manifest() or {}
        if manifest.get("format") is None or side not in manifest["sides"]:
            return None
        settings, entry = manifest["settings"], manifest["sides"][side]
        return {
            "index": index,
            "images": max(0, min(entry["batch_size"], entry["images"] - index * entry["batch_size"])),
            "repetitions": settings["reps_per_image"],
            "made_from": made_from(settings, entry),
        }

    def write_batch(self, side, index, orig, masked, recon):
        """Writes one batch: orig (B, C, H, W), lists of R tensors of that shape.

        Raises:
            UserError: it cannot be written, or the manifest is no longer that of this run.
        """
        identity = self.identity(side, index)
        if self.making and (identity is None or identity["made_from"] != self.making[side]):
            raise UserError(
                f"{self.path / MANIFEST} was removed or replaced while this run wrote there; run the same command again"
            )
        batch = {"orig": orig, "masked": list(masked), "recon": list(recon)}
        if identity is not None:
            batch |= {"identity": identity, "digest": _digest(batch, identity)}
        write_tensors(self.batch_path(side, index), batch)

    def read_batch(self, side, index, reps=1):
        """The batch's `orig` (B, C, H, W) and its first `reps` reconstructions, a list of such tensors.

        Raises:
            UserError: the file is missing or damaged, is no batch or another one, or holds fewer repetitions.
        """
        path, (batch, fault) = self.batch_path(side, index), self._examine(side, index)
        if fault:
            ours = self.identity(side, index) is not None
            remedy = "run the same recon.py command again, it makes it again"
            raise UserError(
                f"{path} {fault}; {remedy if ours else 'copy it again, or make all anew in another --workdir'}"
            )
        if len(batch["recon"]) < reps:
            count = counted(len(batch["recon"]), "repetition")
            raise UserError(f"{path} holds {count}, {reps} were asked for; lower --reps")
        return batch["orig"], batch["recon"][:reps]

    def lacking(self, side):
        """The batches of the manifest's side that are not there or cannot be used, {index: why}; each is read once."""
        indices = range(self.manifest()["sides"][side]["batches"])
        faults = {index: self._examine(side, index)[1] for index in indices}
        return {index: fault for index, fault in faults.items() if fault}

    def _examine(self, side, index):
        """A batch, and what keeps it from being used (None if nothing does), which follows its path in a sentence."""
        path, identity = self.batch_path(side, index), self.identity(side, index)
        if not path.is_file():
            return None, MISSING
        try:
            batch = read_tensors(path, "batch")
        except UserError as error:
            if isinstance(error.__cause__, PermissionError):
                raise
            return None, str(error).removeprefix(f"batch {path} ").split(";")[0]
        return batch, _fault_of_batch(batch, identity)

    def batch_count(self, side):
        """The number of batches of a side, which must be numbered 0, 1, 2, ... without gaps.

        Raises:
            UserError: there are none, one is missing in between, or fewer or more than the manifest announces.
        """
        names = (re.fullmatch(r"batch_(0|[1-9][0-9]*)\.pth", path.name) for path in (self.path / side).glob("batch_*"))
        numbers = sorted(int(name[1]) for name in names if name)
        if not numbers:
            raise UserError(f"{self.path / side} holds no batches ({SIDES[side]} images); run recon.py first")
        announced = self.side_entries().get(side, {}).get("batches", numbers[-1] + 1)
        if numbers[-1] >= announced:
            raise UserError(
                f"{self.batch_path(side, numbers[-1])} is one more than the {counted(announced, 'batch')} that "
                f"{MANIFEST} tells of; move it away"
            )
        if len(numbers) < announced:
            first = next((index for index, number in enumerate(numbers) if index != number), len(numbers))
            raise UserError(
                f"{self.path / side} is incomplete: batch_{first}.pth is missing ({announced - len(numbers)} of "
                f"{announced}); run the same recon.py command again to make it"
            )
        return announced

    def manifest(self):
        """The manifest, or None where there is none (a folder of the published code); not to be changed.

        Raises:
            UserError: it cannot be read, or is none.
        """
        path = self.path / MANIFEST
        if not path.is_file():
            return None
        try:
            status = path.stat()  # an atomic write makes another file of it
            return _read_manifest(path, (status.st_ino, status.st_mtime_ns, status.st_size))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); change its permissions") from error
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise UserError(
                f"{path} cannot be read ({reason}); delete the folder {self.path} and run recon.py again"
            ) from error

    def side_entries(self):
        """The manifest's entries, {side: entry}; none in a folder of the published code."""
        return (self.manifest() or {}).get("sides", {})

    def claim(self, settings, sides, versions):
        """Writes the manifest, or refuses a folder that was made otherwise.

        Args:
            settings: what both sides share (config, checkpoint hash, mask, seed, ...), JSON types.
            sides: `{"pos": {...}}` or with "neg": what each side's batches are made of, and `_INFORMATION`.
            versions: library versions; for information, not compared.

        Raises:
            UserError: the folder holds batches of other settings; the message says which differ.
        """
        settings, sides = json.loads(json.dumps([settings, sides]))  # as they will be read back
        old, made = self.manifest(), [side for side in SIDES if any((self.path / side).glob("batch_*.pth"))]
        if made and (old is None or old.get("format") is None):
            origin = "without a manifest.json" if old is None else "of an earlier version, with another noise"
            raise UserError(
                f"{self.path} holds batches {origin}; choose another --workdir (detect.py still scores these)"
            )
        if not made:  # nothing was made yet by what the manifest says
            old = {"settings": settings, "sides": {}}
        known = [side for side in made if side in sides and side in old["sides"]]
        then, now = ({side: _identifying(entries[side]) for side in known} for entries in (old["sides"], sides))
        differing = differences(old["settings"], settings) + differences(then, now)
        changed = _changed_images(known, then, now)
        if changed and not differences(old["settings"], settings):
            raise UserError(
                f"{self.path} was made of other images: {changed}, or in another order; choose another --workdir, or "
                "delete that folder"
            )
        if differing:
            raise UserError(
                f"{self.path} was made with other settings ({'; '.join(differing[:4])}); choose another --workdir, or "
                "delete that folder"
            )
        merged = {"format": FORMAT, "settings": settings, "sides": {**old["sides"], **sides}, "versions": versions}
        write_json(self.path / MANIFEST, merged)

    def adopt(self, side, indices):
        """Takes over batches of this side from neighbours that made the same, instead of making them again.

        Neighbours are the results folders of the same name under the work folders beside this one, finished or not.
        Each batch is checked before.  Files are hard-linked where the file system allows, else copied.

        Args:
            side: 'pos' or 'neg', in the manifest.
            indices: the batches to look for.

        Returns:
            list: those taken over.

        Raises:
            UserError: a copy cannot be written.
        """
        taken = {}  # in order, and found at once
        for neighbour, their_side in self._neighbours(side):
            for index in [index for index in indices if index not in taken]:
                source = neighbour.batch_path(their_side, index)
                if neighbour._examine(their_side, index)[1] is None and _take(source, self.batch_path(side, index)):
                    taken[index] = None
        return list(taken)

    def _neighbours(self, side):
        """(folder, side) of those whose batches are the same as this folder's of `side`."""
        mine, workdir = self.identity(side, 0), self.path.absolute().parent
        if mine is None:
            return
        with contextlib.suppress(OSError):  # one that may not be listed has no neighbours
            for path in sorted(workdir.parent.iterdir()):
                folder = ResultsFolder(path / self.path.name)
                with contextlib.suppress(UserError, OSError):
                    if path.resolve() != workdir.resolve() and folder.manifest():
                        yield from ((folder, other) for other in SIDES if folder.identity(other, 0) == mine)


def _changed_images(sides, then, now):
    """Which sides have other images, where nothing else about them differs, as text; empty or None else."""
    others = {name for side in sides for name in then[side]} - {"fingerprint", "images", "batches"}
    if any(then[side].get(name) != now[side].get(name) for side in sides for name in others):
        return None
    changed = [side for side in sides if then[side]["fingerprint"] != now[side]["fingerprint"]]
    return ", ".join(f"{SIDES[side]} {then[side]['images']} there, {now[side]['images']} here" for side in changed)


def made_from(settings, entry):
    """The hash of what a side's batches are made from: the manifest's settings and the side's entry."""
    text = json.dumps([settings, _identifying(entry)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _identifying(entry):
    """The part of a side's entry that determines its batches."""
    return {name: value for name, value in entry.items() if name not in _INFORMATION}


def _digest(batch, identity):
    """SHA-256 of a batch's identity and of all its tensors: their names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for name, tensors in (("orig", [batch["orig"]]), ("masked", batch["masked"]), ("recon", batch["recon"])):
        for tensor in tensors:
            digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _fault_of_batch(batch, expected):
    """What is wrong with the content of a batch, or None.

    Args:
        batch: what the file holds.
        expected: the identity it must have, or None where there is none to compare with.
    """
    if not _is_batch(batch):
        return "is no batch of reconstructions"
    identity = batch.get("identity")
    if expected is not None and identity is None:
        return "does not say what it was made from"
    if expected is not None and identity != expected:
        same = identity.get("made_from") == expected["made_from"]
        return "is another batch under this name" if same else "was made from other images or settings"
    if identity is not None and batch.get("digest") != _digest(batch, identity):
        return "is damaged (its content does not match its digest)"
    if expected is None or [len(batch["orig"]), len(batch["recon"])] == [expected["images"], expected["repetitions"]]:
        return None
    return "holds another number of images or repetitions than it says"


def _is_batch(value):
    def images(tensor):
        return torch.is_tensor(tensor) and tensor.ndim == 4 and is_stored(tensor) and not tensor.requires_grad

    def all_like(tensors, orig):
        return isinstance(tensors, list) and all(images(tensor) and tensor.shape == orig.shape for tensor in tensors)

    if not (isinstance(value, dict) and images(orig := value.get("orig")) and all_like(value.get("recon"), orig)):
        return False
    identity = value.get("identity")
    plain = isinstance(identity, dict) and all(type(part) in (int, str) for part in identity.values())
    return identity is None or (plain and all_like(value.get("masked"), orig))


def _take(source, target):
    """Makes `target` the same file as `source`, or a copy of it; False if that can no longer be read."""
    if link(source, target):
        return True
    try:
        data = source.read_bytes()
    except OSError:
        return False
    write_bytes(target, data)
    return True


# What the fields must be where they are there, and those that must be; others may be anything.
_MANIFEST = {"format": POSITIVE, "settings": TABLE, "sides": table_of(TABLE), "versions": TABLE}

_SIDE = {
    "dataset": TEXT,
    "fingerprint": TEXT,
    "images": POSITIVE,
    "batches": POSITIVE,
    "batch_size": POSITIVE,
    "center_crop": FLAG,
    "match_resolution": or_null(POSITIVE),
    "treatment": TABLE,
    "skipped": list_of(list_of(TEXT, 2)),
    "labels": or_null(list_of(TEXT)),
    "positions": or_null(list_of(COUNT)),  # of earlier versions
}


@functools.lru_cache(maxsize=8)
def _read_manifest(path, version):
    """The manifest in a file of which `version` tells when it is another one.

    Raises:
        OSError, ValueError, RecursionError.
    """
    manifest = parse_json(path.read_text(encoding="utf-8"), _MANIFEST, ["settings", "sides"])
    ours = manifest.get("format") is not None
    if ours and manifest["format"] != FORMAT:
        raise ValueError(f"its format {manifest['format']} is of a later version of this program")
    for side, entry in manifest["sides"].items():
        if side not in SIDES:
            raise ValueError(f"sides.{side} is unknown")
        check_fields(entry, _SIDE, ["images", "batch_size", "batches"] if ours else [], f"sides.{side}.")
        _check_sizes(entry, f"sides.{side}")
    check_fields(manifest["settings"], {"reps_per_image": POSITIVE}, ["reps_per_image"] if ours else [], "settings.")
    return manifest


def _check_sizes(entry, where):
    """Whether the numbers of a side's entry agree, where it has them."""
    images, size = entry.get("images"), entry.get("batch_size")
    if images and size and entry.get("batches", 0) != -(-images // size):
        raise ValueError(f"{where} tells of {images} images in batches of {size}, but {entry.get('batches')} batches")
    for name in ("labels", "positions"):
        if images and entry.get(name) is not None and len(entry[name]) != images:
            raise ValueError(f"{where} tells of {images} images and of {len(entry[name])} {name}")
