"""The processes: thin Ray actors that fetch, call one object of flowbp_ray, and return."""
