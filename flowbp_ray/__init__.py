"""flowbp_ray: post-training of text-to-image flow-matching models by reward backpropagation, on Ray."""

__version__ = "0.1.0"
