"""How much of its gradient plain Bradley-Terry (BT) gives to which pairs, on your model and data, and how NormBT would
share it out.

    d        = r_chosen - r_rejected
    error    = 1 - sigma(d)                            prediction error, |dl/dd| of BT
    distance = ||h_chosen - h_rejected||_2             of what the head reads: rho
    head     : ||dl/dv||     = error * distance        exact
    backbone : ||dl/dtheta|| = error * ||dd/dtheta||   measured pair by pair; theta: every trained weight but the head's
    NormBT   : both times w = min(mu / (distance + eps), max_weight), mu the mean distance of these pairs

NormBT (arXiv:2512.06343) claims that BT's gradient grows with the distance at a fixed error, and that w undoes it. Here
that is a number: the slope of log gradient norm on log distance at a fixed error, 1 for BT's head, 0 for NormBT's. The
backbone's own slope is the power of w that undoes it there, and the one that is recommended; none is where the quarters
of the pairs by error have slopes of their own.

    measure.py      diagnose: reads distances, rewards and gradients off the model
    diagnosis.py    what they say: slopes, shares, the decomposition by error and distance
    report.py       the same as a table, a sentence and a figure
"""

from normbt_kernels.diagnostics.diagnosis import Diagnosis, Slope
from normbt_kernels.diagnostics.measure import diagnose

__all__ = ["Diagnosis", "Slope", "diagnose"]
