"""python -m bench <what> [options]: each prints a table and writes <what>.json and <what>.png under bench/results/."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Each module is imported only when it is needed: help needs no torch, and a broken benchmark breaks no other.
SUBCOMMANDS = {
    "speed": "forward and backward time of all contenders, and GB/s beside a plain copy",
    "memory": "peak memory above the inputs",
    "scaling": "time against P and H over four decades, with exponents",
    "train-step": "overhead of a whole training step over plain BT",
    "host": "host time of one step at small batches, operators dispatched and Python calls made",
    "static": "launches and bytes as executed in the interpreter, and what the compiler made of the kernels",
    "tune": "which launch shapes this GPU would like: constants to propose for ops/launch.py",
    "quality": "held-out accuracy of reward models trained with each loss, over seeds (hours on a CPU)",
    "pretrained": "the same on pretrained models and texts of people, from packages (an hour on a CPU)",
    "bf16-margins": "pairs whose order is lost where rewards are rounded to bf16",
    "all": "all of these but tune, quality, pretrained and bf16-margins, into one folder",
}


def load_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a sub-command, made from its module, whose `run` it sets as default.

    Raises:
        ModuleNotFoundError: there is no such module here.
    """
    module = importlib.import_module(f"bench.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser(
        prog=f"python -m bench {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",  # a sub-command's own option of the same name wins
    )
    from bench.harness import add_common_arguments

    add_common_arguments(parser)
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str]) -> int:
    what = "\n".join(f"  {name:14}{summary}" for name, summary in SUBCOMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"{__doc__}\n\n{what}\n\n`python -m bench <what> --help` says what is measured and how.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=SUBCOMMANDS, metavar="what")
    name = parser.parse_args(arguments[:1]).what
    options = load_parser(name).parse_args(arguments[1:])
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        print("\nbench: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
