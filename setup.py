"""Kept so that `pip install .` works everywhere; the metadata is in pyproject.toml."""

from setuptools import setup

setup()
