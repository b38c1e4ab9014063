"""The package's version, and those of the libraries that a result depends on."""

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """What a result depends on besides model, data and settings."""
    import torch
    import transformers

    return {
        "normbt-kernels": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
