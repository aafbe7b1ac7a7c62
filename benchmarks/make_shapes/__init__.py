"""Make the package data of `flowbp_ray.shapes`; see `__main__`."""
