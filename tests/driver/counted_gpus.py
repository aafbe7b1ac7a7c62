"""Set-up of Ray's workers where its GPUs are counted only. It imports no torch, as emulated actors do not."""

from flowbp_ray.utils import accelerator


def compute_on_cpu() -> None:
    """Ray's worker_process_setup_hook: what is called a GPU is the CPU."""
    accelerator.KIND = "cpu"
