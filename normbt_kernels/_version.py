"""The package's version, and those of the libraries that a result depends on."""

from __future__ import annotations

__version__ = "0.1.0"


def installed(distribution: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    from importlib import metadata  # here, because this file is imported with the package

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """What a result depends on besides model, data and settings."""
    return {"normbt-kernels": __version__} | {name: installed(name) for name in ("torch", "transformers")}
