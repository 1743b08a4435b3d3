"""Mutated files of every kind, read by the product's own readers.

    python -m tests.fuzz --mutations=6000 [--kinds=video,torch] [--seed=0] [--keep=DIR]
    python -m tests.fuzz --short                       # what the tests run
    python -m tests.fuzz --only=torch:17 --keep=DIR    # one mutation again, its file kept

Each file is read (ok) or refused (an InputError). Anything else is a fault: another exception, 20 s
and no end, 1.5 GB of memory, a signal; of files with checksums, other values than were saved.
Exit code 1 if there is one. A mutation depends on kind, seed and number alone, a checkpoint's on
Orbax's bytes too.
"""

import argparse
import collections
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.fuzz import checkpoint, media, sidecars, texts, weights
from tests.fuzz.runner import BAD, OK, REFUSED, Runner

_FILES = weights, checkpoint, media, sidecars, texts
KINDS = {k.name: k for file in _FILES for k in file.KINDS}
_CLASSES = (OK, REFUSED, *BAD)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mutations", type=int, default=6000, help="of all kinds together")
    parser.add_argument("--short", action="store_true", help="each kind's own few")
    parser.add_argument("--kinds", default="", help="beginnings of names, with commas between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="KIND:NUMBER")
    parser.add_argument("--keep", type=pathlib.Path, help="folder for files that went wrong")
    args = parser.parse_args()
    if args.only:
        name, _, number = args.only.partition(":")
        kinds, numbers = [KINDS[name]], {name: [int(number)]}
    else:
        begins = tuple(args.kinds.split(","))
        kinds = [k for k in KINDS.values() if k.name.startswith(begins)]
        if not kinds:
            parser.error(f"no kind {args.kinds!r}; there are {', '.join(KINDS)}")
        shares = sum(kind.share for kind in kinds)
        numbers = {
            k.name: range(k.short if args.short else round(args.mutations * k.share / shares))
            for k in kinds
        }
    sys.exit(_run(kinds, numbers, args))


def _run(kinds, numbers, args) -> int:
    print(f"{'':20}" + "".join(f"{name:>10}" for name in ("files", *_CLASSES, "seconds")))
    total, faults = collections.Counter(), []
    with tempfile.TemporaryDirectory(prefix="fuzz") as top:
        for kind in kinds:
            began = time.monotonic()
            runner = Runner(kind, pathlib.Path(top, kind.name), args.seed, args.keep)
            outcomes = runner.run(numbers[kind.name])
            counts = collections.Counter(outcome.what for outcome in outcomes)
            _row(kind.name, counts, time.monotonic() - began)
            total += counts
            bad = [(kind.name, o) for o in outcomes if o.what in BAD]
            for name, o in bad:
                print(f"  --only={name}:{o.number} --seed={args.seed}: {o.what}: {o.detail}")
            faults += bad
            if args.only:
                if args.keep is not None:
                    runner.keep(numbers[kind.name][0])
                print(f"  {outcomes[0].what} {outcomes[0].detail}")
    _row("all", total)
    return bool(faults)


def _row(name, counts, seconds=None) -> None:
    cells = [sum(counts.values()), *(counts[c] for c in _CLASSES)]
    end = "" if seconds is None else f"{seconds:10.1f}"
    print(f"{name:20}" + "".join(f"{n:10}" for n in cells) + end, flush=True)


if __name__ == "__main__":
    main()
