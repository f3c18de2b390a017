"""Tests need no network and no downloaded models."""
