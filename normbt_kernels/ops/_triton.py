"""Triton where it is installed, and just enough of its names to define the kernels where it is not.

    from normbt_kernels.ops._triton import tl, triton

Kernels are plain functions until Triton compiles them, so a module that defines them can be imported
without Triton; `INSTALLED` says whether they can also run.
"""

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl

    INSTALLED = True
    # Triton decides when a kernel is decorated, so the answer holds for the life of the process.
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:
    triton = SimpleNamespace(jit=lambda function=None, **options: function or (lambda function: function))
    tl = SimpleNamespace(constexpr=object)
    INSTALLED = False
    INTERPRETED = False
