"""Writes the loss in the format of the Hugging Face `kernels` package: `get_kernel` then needs no installation.

    python -m bench.hub_kernel FOLDER

    FOLDER/build/torch-<backend>/    the functional forms, the modules, and `layers`, which `kernels` puts into models
    FOLDER/build/torch-<backend>/metadata.json

A build holds the package's own files with relative imports. Its operators have their own namespace, named after the
backend and the content of the files, so that several builds and an installed package can live in one process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

import normbt_kernels

BACKENDS = ("cpu", "cuda", "rocm")
SOURCES = ("_version.py", "checks.py", "errors.py", "functional.py", "modules.py", "ops/*.py")

INIT = '''"""NormBT for reward models as fused Triton kernels (arXiv:2512.06343)."""

from . import layers
from ._version import __version__
from .functional import NormBTStats, linear_normbt_loss, normbt_loss, pair_distance
from .modules import LinearNormBTLoss, NormBTLoss

__all__ = [
    "LinearNormBTLoss",
    "NormBTLoss",
    "NormBTStats",
    "__version__",
    "layers",
    "linear_normbt_loss",
    "normbt_loss",
    "pair_distance",
]
'''

# `kernels` puts the forward of a layer into a module of the model: a layer has no state and no other methods.
LAYERS = '''"""NormBT as stateless layers: `mu` comes in, and the loss goes out."""

from torch import Tensor, nn

from .functional import linear_normbt_loss, normbt_loss


class NormBT(nn.Module):
    """`normbt_loss` of given rewards."""

    can_torch_compile = True

    def forward(
        self,
        chosen_rewards: Tensor,
        rejected_rewards: Tensor,
        chosen_hidden: Tensor,
        rejected_hidden: Tensor,
        mu: Tensor | None = None,
    ) -> Tensor:
        return normbt_loss(chosen_rewards, rejected_rewards, chosen_hidden, rejected_hidden, mu)


class LinearNormBT(nn.Module):
    """`linear_normbt_loss` with the scalar head fused in."""

    can_torch_compile = True

    def forward(self, hidden: Tensor, weight: Tensor, mu: Tensor | None = None) -> Tensor:
        return linear_normbt_loss(hidden, weight, mu)


__all__ = ["LinearNormBT", "NormBT"]
'''


def build(folder: Path) -> list[Path]:
    """Writes one build for each backend below `folder`, and returns their folders.

    Raises:
        FileExistsError: `folder` holds builds already.
    """
    package = Path(normbt_kernels.__file__).parent
    files = {path.relative_to(package): path.read_text("utf-8") for part in SOURCES for path in package.glob(part)}
    files |= {Path("__init__.py"): INIT, Path("layers.py"): LAYERS}
    content = hashlib.sha256(json.dumps(sorted((str(path), text) for path, text in files.items())).encode())
    builds = []
    for backend in BACKENDS:
        name = f"normbt_{backend}_{content.hexdigest()[:12]}"
        variant = folder / "build" / f"torch-{backend}"
        variant.mkdir(parents=True)
        for path, text in files.items():
            target = variant / path
            target.parent.mkdir(exist_ok=True)
            target.write_text(_relative(text, path, name), "utf-8")
        metadata = {
            "id": name,
            "name": "normbt-kernels",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
        builds.append(variant)
    return builds


def _relative(text: str, path: Path, namespace: str) -> str:
    """The source of the module `path` with relative imports, and its operators in `namespace`."""
    to_root = "." * len(path.parts)
    text = re.sub(r"^(\s*from )normbt_kernels\.(\S+ import)", rf"\1{to_root}\2", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*from )normbt_kernels( import)", rf"\1{to_root}\2", text, flags=re.MULTILINE)
    return re.sub(r'(?m)^NAMESPACE = "normbt"$', f'NAMESPACE = "{namespace}"', text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the builds go; must hold none yet")
    try:
        builds = build(parser.parse_args().folder)
    except FileExistsError as error:
        parser.error(f"{error.filename} exists already: choose another folder")
    print(*(f"wrote {path}" for path in builds), sep="\n")


if __name__ == "__main__":
    main()
