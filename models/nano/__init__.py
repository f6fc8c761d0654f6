"""The small model that ships with the package: the pictures it learns from, and its training."""
