"""NormBT in other people's trainers. Each module imports its library; importing this package imports none."""
