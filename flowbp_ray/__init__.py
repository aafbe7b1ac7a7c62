"""flowbp_ray: post-training of text-to-image flow-matching models by reward backpropagation, on Ray."""

from flowbp_ray.utils.imports import without_kernels

__version__ = "0.1.0"

without_kernels()
