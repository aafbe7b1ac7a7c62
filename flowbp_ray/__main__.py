"""python -m flowbp_ray"""

from flowbp_ray.cli import main

main()
