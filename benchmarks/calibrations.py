"""Times of single large convolutions in each form, which come with the package as what `auto` knows.

python benchmarks/calibrations.py NAME --backend B ... --precision P ... --network VARIANT:SIZE:BATCH,BATCH ...

Writes replk_deploy/calibrations/NAME.json after each backend, precision and network; what it holds besides stays.
SIZE is N or HxW. Weights are random: times do not depend on them.
"""

import argparse
from pathlib import Path

from replk_deploy import calibrate, costs, lower, options
from replk_deploy.backends import BACKENDS, find
from replk_deploy.models.replknet import VARIANTS, RepLKNet
from replk_deploy.precision import PRECISIONS

FOLDER = Path(__file__).resolve().parent.parent / "replk_deploy" / "calibrations"
NETWORKS = ("RepLKNet-31B:224:1,8,64", "RepLKNet-31L:384:1,32", "RepLKNet-XL:320:1,32", "RepLKNet-31B:512x2048:1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--backend", action="append", choices=list(BACKENDS), required=True)
    parser.add_argument("--precision", action="append", choices=PRECISIONS, required=True)
    parser.add_argument("--network", action="append")
    asked = parser.parse_args()
    path = FOLDER / f"{asked.name}.json"
    for network in asked.network or NETWORKS:
        variant, size, batches = network.split(":")
        empty = RepLKNet.empty(VARIANTS[variant], "folded")
        sites = lower.find_network(empty, options.size_of(size) or (0, 0))
        for backend in asked.backend:
            for precision in asked.precision:
                found = calibrate.calibrate(
                    find(backend), sites, batches=[int(b) for b in batches.split(",")], precision=precision
                )
                costs.add(path, found)
                print(network, backend, precision, len(found.costs), flush=True)


if __name__ == "__main__":
    main()
