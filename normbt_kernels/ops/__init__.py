"""The operators of the package: one file per operation, each readable downward."""
