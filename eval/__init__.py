"""Metrics: arrays and strings in, numbers out. Imports no other package of this project.

Waves are one-dimensional float arrays (S,) in [-1, 1] with a sample rate.
"""
