"""The reference's mu, moved once for each step of an optimizer."""

import torch

import reference

START = 2.0  # a mu from before, because the first step of a loop that knows only one micro-batch at a time has none


class StepEMA(reference.DistanceEMA):
    """All pairs of a step are weighed by the mu from before it, and their mean moves it when the step ends."""

    def __init__(self):
        super().__init__(beta=0.9)
        self.mu = torch.tensor(START)
        self._of_step = []

    def update(self, rho):
        self._of_step.append(rho.detach())

    def end_step(self, *_):
        super().update(torch.cat(self._of_step))
        self._of_step = []


def start(loss_fn):
    """Gives one of our losses the same mu."""
    loss_fn.load_state_dict({"mu": torch.tensor(START), "num_updates": torch.tensor(1)})
    return loss_fn
