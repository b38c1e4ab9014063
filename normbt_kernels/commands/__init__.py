"""The command line `normbt`: train, evaluate, diagnose and info, one file each, called by cli.py. `normbt export` calls
integrations/export.py.

A new option goes into arguments.py, a new loss to train with into losses.py, a new command into a file and cli.py.
"""
