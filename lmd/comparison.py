"""What compare.py does: scores the same images by many methods on one model, and puts them all into one table.

What a method measures of a set of images is kept in the output folder, in files named by all that it depends on: method
and settings, checkpoint, images.  So another run measures only what is new to it.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np

import datasets
from basics import distributed, files
from basics.console import UserError, are, counted, say, warn
from lmd import shifts
from lmd.candidates import Bench, Set, Sets
from lmd.comparison_report import report
from lmd.held_out import content_keys_of, held_out, shared_with, to_learn_from
from lmd.methods.selection import check_overrides, select
from lmd.ranking import tabulate
from lmd.trained_model import identity, open_model
from storage.comparisons import REPORT

MADE_UP = "shifts"  # stands for all kinds of made-up foreign images; `shifts:blur` is one of them
FEWEST = 50  # in-domain images to score; of fewer even the first digit of a ROC-AUC is luck
_KEPT = "measured"  # folder in the output


@dataclasses.dataclass(frozen=True)
class ComparisonJob:
    """What to compare, on what, and where to: what compare.py's flags say, under their names.

    Attributes:
        config: the config tree.
        ckpt_path, data_root, workers, seed, memory_gb, precision: as in `reconstruction.Job`.
        in_domain: the source of the in-domain images.
        out_of_domain: sources of foreign images, separated by commas; see `MADE_UP`.
        output: the folder of the results.
        fit: the source of other in-domain images, which the methods learn from; None for half of `in_domain`.
        methods: see `methods.selection.select`.
        parts: whether the parts of methods that combine several get rows of their own.
        center_crop: as --id_center_crop of recon.py.
        max_images: of each source, evenly spread.
        compile: whether to compile the network first, see `models.inference.worth_compiling`.
        overridden: paths of the fields of the config that a command line set, see `configs.base.typed`.
        command: the command line, which is kept.
    """

    config: object
    ckpt_path: str
    in_domain: str
    out_of_domain: str
    output: str
    fit: str | None = None
    methods: str = "all"
    parts: bool = False
    center_crop: bool = True
    seed: int = 0
    max_images: int | None = None
    data_root: str = "./data"
    workers: int | None = None
    memory_gb: float | None = None
    precision: str = "auto"
    compile: str = "auto"
    overridden: frozenset = frozenset()
    command: str = ""


def compare(job, device, ranks=distributed.ALONE):
    """Measures what is missing, writes the tables and the picture, and prints the tables.

    Args:
        job: a `ComparisonJob`.
        device: torch.device.
        ranks: the processes that share the work, all of which call this.

    Returns:
        ranking.Table.

    Raises:
        UserError: for bad input, or where no method could be scored at all.
    """
    chosen, sources = select(job.methods), foreign_sources(job.out_of_domain)
    check_overrides(chosen.values(), job.config, job.overridden)
    _check_place(Path(job.output))
    model = open_model(job.ckpt_path, job.config, device, job.precision, job.memory_gb)
    source, precision = model.source, model.score.net.precision
    origin = identity(job.config, source, job.seed, precision)
    with ranks.owned(job.output):
        sets = ranks.in_turn(lambda: _load(job, sources, source.path))
        bench = Bench(model, sets, origin, Path(job.output) / _KEPT, ranks, job.parts, job.compile)
        candidates = bench.candidates(chosen)
        table = tabulate(candidates, list(sets.foreign))
        facts = _facts(job, sets, dataclasses.asdict(source), precision)
        ranks.on_main(lambda: report(job.output, table, facts, _scores(candidates, sets)))
    return table


def _check_place(folder):
    """Refuses a folder of other files, which would no longer be taken for images once this program has written there.

    Raises:
        UserError: it is one, or holds other results of this program.
    """
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()}
    ours = files.MARK in names and not names.isdisjoint((_KEPT, REPORT))
    if not ours and any(not name.startswith(".") for name in names):
        raise UserError(f"{folder} holds other files; choose an --output that is empty or not there yet")


def _facts(job, sets, checkpoint, precision):
    """What compare.json says of how the table was made."""
    described = lambda source, one: {"source": source, "fingerprint": one.images.fingerprint, "images": len(one.images)}
    return {
        "fit": described(job.fit or f"{job.in_domain} (half of it)", sets.fit),
        "in_domain": described(job.in_domain, sets.in_domain),
        "out_of_domain": {name: described(name, one) for name, one in sets.foreign.items()},
        "checkpoint": checkpoint,
        "precision": precision,
        "seed": job.seed,
        "command": job.command,
    }


def _scores(candidates, sets):
    """What `storage.comparisons.write_comparison` writes of single images: arrays by name."""
    sides = lambda known, foreign: {"in_domain": known, **{f"out_of_domain/{n}": one for n, one in foreign.items()}}
    found = {
        f"files/{name}": np.array(one.images.labels)
        for name, one in sides(sets.in_domain, sets.foreign).items()
        if one.images.labels is not None
    }
    for one in candidates:
        scores = sides(one.in_domain, one.out_of_domain)
        found |= {f"scores/{one.label}/{name}": values for name, values in scores.items() if values is not None}
    return found


# ------------------------------------------------------------------------------------------------------- images


def foreign_sources(text):
    """The sources that --out_of_domain names, each once; `shifts` becomes `shifts:noise`, `shifts:blur`, ...

    Raises:
        UserError: there are none, a made-up shift is unknown, or a path has a comma.
    """
    if "," in text and Path(files.expand_home(text)).exists():
        raise UserError(
            f"--out_of_domain is a list separated by commas, and the path {text} has a comma in it; rename it, or link "
            "to it by another name"
        )
    names = [name.strip() for name in text.split(",") if name.strip()]
    found = []
    for name in names:
        kind = name.removeprefix(f"{MADE_UP}:")
        if name == MADE_UP:
            found += [f"{MADE_UP}:{each}" for each in shifts.SHIFTS]
        elif kind != name and kind not in shifts.SHIFTS:
            raise UserError(f"unknown made-up shift '{kind}'; choose one of: {', '.join(shifts.SHIFTS)}")
        else:
            found.append(name)
    if not found:
        raise UserError(f"--out_of_domain names no images; list sources, or {MADE_UP} for made-up ones")
    return list(dict.fromkeys(found))


def _load(job, sources, ckpt_path):
    """The `Sets`, checked against each other and against what the model was trained on."""
    data = job.config.data
    load = functools.partial(
        datasets.load_any,
        image_size=data.image_size,
        num_channels=data.num_channels,
        center_crop=job.center_crop,
        category=data.get("category"),
        data_root=job.data_root,
        workers=job.workers,
    )
    known = held_out(load, job.in_domain, "--in_domain", job.config, ckpt_path, job.max_images)
    if job.fit is None:
        fit, known = _halves(known)
        say(f"methods learn from {len(fit):,} of the images of {job.in_domain}; scored are the other {len(known):,}")
    else:
        fit = held_out(load, job.fit, "--fit", job.config, ckpt_path, job.max_images)
    learned = set(content_keys_of(fit).tolist())
    if job.fit is not None:
        _check_apart(job, known, learned)
    if len(known) < FEWEST:
        few = counted(len(known), "in-domain image")
        warn(f"{few} to score {are(len(known))} too few for the table to say much; give at least {FEWEST}")
    load = functools.partial(load, max_images=job.max_images)
    return Sets(Set(fit), Set(known), _foreign(load, sources, known, learned))


def _foreign(load, sources, known, learned):
    """The foreign `Set`s by name; warns of those that hold in-domain images.

    Args:
        load: called as load(source), gives an `ImageSet`.
        sources: their names.
        known: the in-domain images to score.
        learned: the content keys of those that methods learn from, a set.
    """
    if any(name.startswith(f"{MADE_UP}:") for name in sources):
        shifts.check_size(known, f"leave {MADE_UP} out")
    keys = content_keys_of(known)
    in_domain, foreign = learned.union(keys.tolist()), {}
    for name in sources:
        kind = name.removeprefix(f"{MADE_UP}:")
        if kind != name:
            foreign[name] = Set(known, kind, shifts.change_of(kind, known, keys))
            continue
        foreign[name] = Set(load(name))
        for other, one in list(foreign.items())[:-1]:
            if one.shift is None and one.images.fingerprint == foreign[name].images.fingerprint:
                raise UserError(f"{other} and {name}, out of domain, are the same images; leave one out")
        if shared := shared_with(foreign[name].images, in_domain):
            of = counted(len(foreign[name].images), "image")
            warn(
                f"{name}, out of domain, shares {shared:,} of its {of} with the in-domain ones; its ROC-AUC says little"
            )
    return foreign


def _halves(images):
    """Two parts of an `ImageSet`: to learn from, and to score.

    Raises:
        UserError: there is one image alone, or as `to_learn_from`.
    """
    if len(images) < 2:
        raise UserError(f"--in_domain has {len(images)} image, of which no half can be learned from; give --fit, too")
    learning = to_learn_from(images, len(images) // 2)
    return images.part(learning.nonzero().flatten()), images.part((~learning).nonzero().flatten())


def _check_apart(job, known, learned):
    """Refuses scores of the very images that the methods learned from, whose content keys are `learned`."""
    shared = shared_with(known, learned)
    share = f"{shared:,} of the {counted(len(known), 'image')} of"
    if 2 * shared > len(known):
        raise UserError(
            f"{share} --in_domain {job.in_domain} {are(shared)} those of --fit {job.fit}: "
            "methods know what they were fitted to, and every ROC-AUC would be too good; give other images, or "
            "leave --fit out: half of the in-domain images are learned from then"
        )
    if shared:
        warn(f"{share} {job.in_domain} {are(shared)} in {job.fit}, which methods learn from")
