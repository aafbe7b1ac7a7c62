"""`flowbp-ray` and `python -m flowbp_ray`: what is looked at before torch is imported, then the command line."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line. From a folder that was removed torch would end the process with words of its own."""
    try:
        os.getcwd()
    except OSError:
        print("flowbp-ray: the folder that this shell is in is not there any more; cd to another", file=sys.stderr)
        sys.exit(2)
    from flowbp_ray.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
