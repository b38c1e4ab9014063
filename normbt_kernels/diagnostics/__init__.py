"""Measures which pairs receive the gradient of plain Bradley-Terry (BT) on a model and its data, and under NormBT.

    d        = r_chosen - r_rejected
    error    = 1 - sigma(d)                            prediction error, |dl/dd| of BT
    distance = ||h_chosen - h_rejected||_2             rho, of the rows that the head reads
    head     : ||dl/dv||     = error * distance        exact
    backbone : ||dl/dtheta|| = error * ||dd/dtheta||   measured pair by pair; theta: every trained weight but the head's
    NormBT   : both times w = min(mu / (distance + eps), max_weight), mu the mean distance of these pairs

The paper (arXiv:2512.06343) claims that BT's gradient grows with the distance at a fixed error, and that w removes this
growth. The slope of log gradient norm on log distance at a fixed error measures it: it is 1 for BT's head and 0 for
NormBT's. The slope in the backbone is the power of w that removes the growth there, and the recommended one. If the
slopes within quarters of the pairs by error disagree, no power is recommended.

    measure.py      `diagnose` measures distances, rewards and gradients on the model
    diagnosis.py    computes slopes, shares, and means by error and distance from them
    report.py       shows these as a table, a sentence and a figure
"""

from normbt_kernels.diagnostics.diagnosis import Diagnosis, Slope
from normbt_kernels.diagnostics.measure import diagnose

__all__ = ["Diagnosis", "Slope", "diagnose"]
