"""Speed and memory of tagmill against other libraries, side by side: one Markdown table a part.

    python -m tests.bench flat hinge folds tree growth start integrity

flat       one-vs-rest logistic to the same objective
hinge      one-vs-rest squared hinge
folds      final and out-of-fold models of three folds
tree       all labels, against the trees of the peers
growth     own runs, documents and labels times 1, 2, 4, 8
start      from the start of a job to its first solved group
integrity  hashes, fsync, manifests and accounting: their share of a fit

TAGMILL_DATA names the folder of corpora (parts that need one are skipped without), TAGMILL_PEERS the environment of
peers.lock (default .venv-peers, made by `make bench-env`; peers are skipped without), TAGMILL_BENCH where matrices are
kept (default: below the temporary folder).
"""

import argparse
import sys
from pathlib import Path

from tests.bench import against, growth, integrity, start, tree
from tests.bench.processes import Skipped
from tests.bench.report import command_line

PARTS = {
    "flat": against.flat,
    "hinge": against.hinge,
    "folds": against.folds,
    "tree": tree.tree,
    "growth": growth.growth,
    "start": start.start,
    "integrity": integrity.integrity,
}


def main():
    parser = argparse.ArgumentParser(
        "python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--labels", type=int, default=32, help="of flat, hinge and folds, spread over supports")
    parser.add_argument("--corpus", action="append", dest="corpora", metavar="NAME", help="instead of a part's own")
    parser.add_argument("--all", action="store_true", help="all peers in folds, not only the two fastest")
    parser.add_argument("--large", action="store_true", help="growth: 1,000,000 documents too")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="list that results are added to")
    options = parser.parse_args()
    command = command_line(sys.argv[1:])
    for part in options.parts:
        try:
            report = PARTS[part](options)
        except Skipped as why:
            print(f"{part} is skipped: {why}\n", flush=True)
            continue
        print(report.markdown(command), flush=True)
        if options.out:
            report.append(options.out, command)


if __name__ == "__main__":
    main()
