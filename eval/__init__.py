"""Scores. Arrays and strings in, numbers out; imports none of the other packages.

Waves are one-dimensional float arrays (S,) in [-1, 1] with their sample rate beside them.
"""
