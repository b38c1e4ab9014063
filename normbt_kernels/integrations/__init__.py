"""NormBT in other people's trainers: transformers.py, trl.py, and apply.py for any other. This package imports none.

A new trainer gets a file named like its library, if one line of `apply_normbt` is not enough. checkpoint.py,
trainer_steps.py, trainer_data.py and trainer_metrics.py are parts of trainers; head.py finds and reads the scalar head.
"""
