"""Zip: similar units of several models, and of one model, become one."""

from jaxmerge.align.zipping.greedy import greedy, kmeans
from jaxmerge.align.zipping.merging import merge_matrices
from jaxmerge.align.zipping.partial import partial_zip
from jaxmerge.align.zipping.program import ZipInfo, zipit

__all__ = ["ZipInfo", "greedy", "kmeans", "merge_matrices", "partial_zip", "zipit"]
