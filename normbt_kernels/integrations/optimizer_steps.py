"""Tells a loss inside a model when the optimizer of that model steps, although nobody gives it the optimizer."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from normbt_kernels.modules import DistanceEMA

_models: weakref.WeakKeyDictionary[DistanceEMA, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def follow_optimizer_of(model: nn.Module, ema: DistanceEMA) -> None:
    """Moves `ema` once for each step of the optimizers that train `model`, whether they exist already or not.

    As long as no such optimizer exists, each forward is a step.
    """
    _hook_all_optimizers()
    _models[ema] = weakref.ref(model)
    # type(), because isinstance() looks up __class__, and some objects warn when it is read.
    optimizers = [each for each in gc.get_objects() if issubclass(type(each), Optimizer)]
    ema.per_step = any(trains(optimizer, model) for optimizer in optimizers)


@functools.cache
def _hook_all_optimizers() -> None:
    register_optimizer_step_post_hook(_end_step)


def _end_step(optimizer: Optimizer, *_: Any) -> None:
    for ema, model in list(_models.items()):
        if model() is not None and trains(optimizer, model()):
            ema.per_step = True
            ema.end_step()


def trains(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether `optimizer` holds a parameter of `model`, or a tensor that DeepSpeed made from one."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = list(model.parameters())
    if not {id(parameter) for parameter in held}.isdisjoint(id(parameter) for parameter in own):
        return True
    if any(hasattr(parameter, "_z3_optimizer") for parameter in own):  # ZeRO-3
        return any(parameter._z3_optimizer.optimizer is optimizer for parameter in own)
    # ZeRO-1 and 2: the optimizer's parameters are flat, and each parameter of the model knows its part of them.
    parts = [parameter._hp_mapping for parameter in own if getattr(parameter, "_hp_mapping", None) is not None]
    memory = {parameter.untyped_storage().data_ptr() for parameter in held} if parts else set()
    return any(part.get_hp_fragment().untyped_storage().data_ptr() in memory for part in parts)
