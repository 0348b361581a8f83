"""Lists the packages, so that none is forgotten; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["jaxmerge", "jaxmerge.*"]),
        *(f"jaxmerge.{name}" for name in find_packages(include=["converters", "converters.*"])),
    ]
)
