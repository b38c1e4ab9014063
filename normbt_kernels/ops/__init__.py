"""The operators of the package: one file per operation, each readable downward.

terms.py says what goes into the loss and comes out: a new option begins there. A new operator is a new file.
"""
