"""The sections of a run's configuration, one class each. `schema.RunConfig` puts them together."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator

from flowbp_ray.config.data import Columns, Where
from flowbp_ray.utils import addresses
from flowbp_ray.utils.addresses import UserPath
from flowbp_ray.utils.settings import ProcessConfig, Strict

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


Attention = Literal[
    "native",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
    "_native_math",
    "flash",
    "flash_hub",
    "flash_4_hub",
    "_flash_3",
    "_flash_3_hub",
    "flex",
    "xformers",
]
"""Those attention backends of diffusers' dispatcher that have a backward pass."""

NonFinite = Literal["skip_sample", "skip_step", "stop"]
"""What a value that is not finite costs: its sample, the step, or the run."""


class BackboneConfig(Strict):
    """Which model is trained, and how images are sampled from it."""

    name: str
    """Model family: shapes (embedded, for tests and the demo), sd35, flux1, flux2 or qwen_image."""
    path: UserPath | None = None
    """Folder of the model as diffusers saves it. null: the weights that come with the package (shapes only)."""
    height: int = Field(64, gt=0)
    """Height of the images in pixels."""
    width: int = Field(64, gt=0)
    """Width of the images in pixels."""
    num_steps: int = Field(25, ge=1)
    """Sampling steps from noise to image in training. Evaluations take as many unless evaluation.num_steps is set."""
    guidance: float = Field(1.0, ge=1.0)
    """Guidance scale in training: of classifier-free guidance, or the one that the model embeds. 1: no guidance."""
    detach_negative: bool = True
    """true: with classifier-free guidance the unconditional branch gets no gradient. false: both branches do, which
    doubles the rows of a learner's forward."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights that compute: float32 or bfloat16. The optimizer's own copies are always float32. float16 is
    not offered, since its gradients would need loss scaling."""
    quantization: Literal["int8", "nf4"] | None = None
    """Hold the frozen base in fewer bits, in samplers and learners, and train adapters over it: int8 (8 bits a weight)
    or nf4 (4.5 bits). It needs learners.lora and the extra `quant` (docs/one-card.md). null: in `dtype`."""
    sigmas: Literal["pipeline", "even"] = "pipeline"
    """Noise levels of the sampling steps. pipeline: those of the family's pipeline in diffusers. even: evenly spaced
    before the shift. They differ for sd35 only, whose published runs are even."""
    compile: Literal["blocks"] | None = None
    """blocks: samplers and learners compile the transformer's repeated blocks (torch.compile), which takes minutes once
    in each process and makes its forwards faster on GPUs. null: nothing is compiled."""
    attention: Attention | None = None
    """Kernel of the transformer's attention, by its name in diffusers' dispatcher: native, _native_cudnn, flash,
    _flash_3_hub and others that have a gradient. Not for sd35, whose attention is always torch's. null: torch's own
    choice."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


class EncoderConfig(ProcessConfig):
    """The process that encodes the prompts which the run draws, ahead of training and beside it.

    It ends when it has done so. With `gpus` it stays beside training where the cluster has GPUs for all; otherwise it
    encodes everything before the others are placed.
    """

    ahead: int = Field(16, ge=0)
    """Steps beyond those in progress whose prompts wait in Ray's object store, with those of an evaluation among them.
    With a cache all others wait there, on disk. It is a number of steps because each step's prompts are known in
    advance: `flowbp-ray plan` says how many bytes they are."""
    longest: float | None = Field(3600.0, gt=0)
    """Seconds that text encoders on CPU threads may take by estimate for the prompts that the cache lacks; what takes
    longer is refused before the run starts. null: nothing is refused."""
    cache: str | None = Field("auto", min_length=1)
    """Folder in which embeddings are kept on disk, which runs may share. auto:
    `$FLOWBP_RAY_CACHE/embeddings` where that variable is set, otherwise `flowbp_ray/embeddings` in `$XDG_CACHE_HOME` or
    `~/.cache`. null: nothing is kept."""

    @field_validator("cache")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        """Make it absolute, as seen from where the command runs: actors run elsewhere."""
        return value if value == "auto" else addresses.absolute(value)


class EvaluationConfig(Strict):
    """Measurements on held-out prompts, always with the same noise: before and after training, and during it."""

    prompts: UserPath | None = None
    """The held-out prompts: a file, pattern or folder as for data.prompts, or `data:heldout` for those that
    data.heldout keeps from training. null: nothing is evaluated."""
    columns: Columns = None
    """As data.columns, for a file of its own. null: the names do not differ."""
    split: str | None = Field(None, min_length=1)
    """As data.split, for a folder of its own. null: the only one."""
    where: Where = None
    """As data.where. null: all are taken."""
    every: int = Field(0, ge=0)
    """Steps between two evaluations. 0: only before and after training."""
    limit: int | None = Field(None, ge=1)
    """Number of prompts that are used, from the beginning of the file. null: all."""
    batch: int = Field(30, ge=1)
    """Images that a sampler draws and a reward server scores at a time."""
    num_steps: int | None = Field(None, ge=1)
    """Sampling steps of an evaluation. null: backbone.num_steps."""
    guidance: list[Annotated[float, Field(ge=1)]] = Field([1.0])
    """Guidance scales that every evaluation measures, one after the other. 1 means no guidance."""
    guidance_ends: list[Annotated[float, Field(ge=1)]] = Field([])
    """Further guidance scales, which are measured before and after training only."""
    pictures: int = Field(36, ge=1)
    """Images in the picture sheet of an evaluation, spread over the held-out prompts."""
    seed: int = 7
    """Seed of the noise from which evaluations draw."""
    base_cache: str | None = Field(None, min_length=1)
    """Folder in which the evaluation before the first step is kept for other runs that begin with the same model and
    measure the same, on alike machines; `flowbp-ray compare` sets it. null: each run draws it."""

    @field_validator("base_cache")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return addresses.absolute(value)


class GuardConfig(Strict):
    """Ends a run whose reward is being hacked: the trained reward rises while what is only measured falls.

    It looks at evaluations, so it needs evaluation.prompts and evaluation.every. See docs/rewards.md.
    """

    metrics: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Metric name -> how far it may fall below its first value, in its own unit. Monitors, judges and the verifier
    can be named, but no reward that is trained on."""
    patience: int = Field(2, ge=1)
    """Evaluations in a row in which a metric must have fallen by more than that, while a trained reward is above its
    first value, before the guard acts."""
    action: Literal["warn", "stop", "rollback"] = "stop"
    """warn: a line in the log. stop: end the run there. rollback: end it with the weights of the evaluation at which
    the guarded metrics were best."""


class CheckpointConfig(Strict):
    """When the run is saved, so that it can be resumed."""

    every: int = Field(0, ge=0)
    """Steps between two checkpoints. 0: only at the end."""
    keep: int = Field(2, ge=1)
    """Number of checkpoints that are kept; older ones are deleted."""
    background: bool = True
    """true: learners copy their state into host memory and go on while a thread writes it; where the memory is not
    free it is written at once. false: the run always waits until it is written."""


class DriftConfig(Strict):
    """How far the learner's velocities are from those of the sampler, which may have used older weights.

    It is the mean |Σ h[i]·(v_learner(x[i]) − v_sampler[i])| over the active nodes, in units of the latents.
    """

    meter: bool = False
    """true: report the drift of every step. The K velocities of each image then travel to the learner as well."""
    max: float | None = Field(None, gt=0)
    """Samples whose drift is above this are masked, and the mean is over the others; this costs a forward without
    gradient in the learner. null: none is masked. Needed where staleness is above 1."""

    @property
    def on(self) -> bool:
        return self.meter or self.max is not None


class TrackingConfig(Strict):
    """Where numbers are sent besides the run's folder."""

    wandb: bool = False
    """true: log to Weights & Biases too: online where WANDB_API_KEY or ~/.netrc has a key and the server answers,
    otherwise offline. WANDB_MODE decides where it is set."""
    tensorboard: bool = False
    """true: write event files for TensorBoard too, to tensorboard/ in the run's folder."""
    mlflow: bool = False
    """true: log to MLflow too: to the server of MLFLOW_TRACKING_URI, otherwise to mlflow.db beside the run's folder."""
    project: str = "flowbp_ray"
    """Project at Weights & Biases, experiment at MLflow."""
    pictures: int = Field(8, ge=0)
    """Pictures of an evaluation that trackers get, with their prompts. 0: none."""


class ClusterConfig(Strict):
    """The Ray cluster, and what happens when something on it fails."""

    address: str = "local"
    """Ray to use. local: a private one on this machine. auto: the cluster that runs here, as for a submitted job.
    host:port: that cluster. The environment variable RAY_ADDRESS goes before this key."""
    tries: int = Field(3, ge=1)
    """How often an item is tried before the run stops, and how often in a row the learners are built again without
    completing a step."""
    stall_timeout: float = Field(600.0, gt=0)
    """Seconds without an answer after which a process counts as lost and is started again, or the run as stalled."""
    placement_timeout: float = Field(30.0, gt=0)
    """Seconds to find room for a pool. Where the cluster must start nodes first, write the minutes that this takes."""
    deterministic: bool = False
    """true: only deterministic GPU kernels, which are slower. On CPUs kernels are deterministic anyway."""
    scaling: Literal["hand", "rule"] = "hand"
    """Who changes the number of samplers and reward servers, within their min and max. hand: only
    `flowbp-ray scale`. rule: also the run itself, from how busy they are; it needs staleness of at least 1."""
    colocate: Literal[False, True, "pairs"] = False
    """false: processes get what their `gpus` says.
    true: samplers, reward servers and the one learner share a GPU: each process gets the part of it that
    `flowbp-ray plan` says it needs, whatever its `gpus` says, and gives back cached memory when its turn is over.
    pairs: each of learners.count GPUs has one learner and one sampler, which take turns in the same way. Reward
    servers with rewards.gpus of at most 0.2 are on them too, others have GPUs of their own. It needs staleness 0. See
    docs/cluster.md."""
    share_base: bool = False
    """true: the sampler and the learner are one process with one copy of the frozen base, in turns, for adapters on
    one GPU. The weights are the same as those of two processes (docs/one-card.md). The process takes the `threads` of
    learners, and the sum of the two pools' cpus and gpus."""
    transport: Literal["object_store", "nccl"] = "object_store"
    """How weights travel from learners to samplers. object_store: through host memory, by Ray. nccl: learner rank 0
    broadcasts them, between GPUs by NCCL and between CPUs by gloo; who misses a broadcast takes them from the object
    store, as adapters and the averages of nft.policy always do. It needs a whole GPU for each process. With staleness
    S samplers keep S versions beside the one in use, and rank 0 keeps S + 1 in host memory. See docs/cluster.md."""
