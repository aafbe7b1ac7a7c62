"""What a reward is, and the table that finds one by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from flowbp_ray.utils.addresses import existing_path
from flowbp_ray.utils.errors import nearest


@runtime_checkable
class Reward(Protocol):
    """One number per image, higher is better, differentiable in the images.

    A reward is stateless between calls as far as its values go: the score of a row depends on that row alone.
    A reward that fails raises; it never answers zero.
    """

    name: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W] (float, values in 0..1) against B prompts; returns [B]."""
        ...


REWARDS: dict[str, str] = {
    "aesthetic": "flowbp_ray.rewards.aesthetic:Aesthetic",
    "clipscore": "flowbp_ray.rewards.clipscore:CLIPScore",
    "geneval": "flowbp_ray.rewards.geneval.metric:GenEval",
    "hpsv2": "flowbp_ray.rewards.hpsv2:HPSv2",
    "hpsv3": "flowbp_ray.rewards.hpsv3:HPSv3",
    "image_reward": "flowbp_ray.rewards.image_reward:ImageReward",
    "ocr": "flowbp_ray.rewards.ocr:OCR",
    "pickscore": "flowbp_ray.rewards.pickscore:PickScore",
    "shapes_clip": "flowbp_ray.rewards.shapes_clip:ShapesClip",
    "shapes_clip_heldout": "flowbp_ray.rewards.shapes_clip:ShapesClipHeldout",
    "shapes_detector": "flowbp_ray.rewards.shapes_detector:ShapesDetector",
    "shapes_preference": "flowbp_ray.rewards.shapes_clip:ShapesPreference",
    "shapes_preference_heldout": "flowbp_ray.rewards.shapes_clip:ShapesPreferenceHeldout",
    "shapes_verifier": "flowbp_ray.rewards.shapes_verifier:ShapesVerifier",
    "soft_geneval": "flowbp_ray.rewards.geneval.soft_metric:SoftGenEval",
}
"""Name -> "module:factory". Strings, so that the packages that one reward needs are imported only where it is used."""


def build(name: str, device: str = "cpu", /, **options: Any) -> Reward:
    """Build the reward registered as `name`; "package.module:Factory" names one that lives outside the library.

    Where images and models are on a GPU the factory is given `device`.
    """
    if device != "cpu":
        options["device"] = device
    reward = factory(name)(**options)
    if not isinstance(reward, Reward):
        raise ValueError(f"{name} built a {type(reward).__name__}, which has no name and score(images, prompts)")
    return reward


def check(name: str, options: Mapping[str, Any], device: str = "cpu") -> None:
    """Raise ValueError for what `build(name, device, **options)` would refuse, without building it.

    That is an unknown name (the message offers the nearest known one), a package that is not installed, an option that
    the factory does not take, a GPU for a factory that takes no `device`, and whatever the factory's own `check`, if it
    has one, refuses: a missing file, say. The parameters of that `check` are some of the factory's, whose defaults they
    have.
    """
    given = _arguments(name, options)
    if device != "cpu":
        _check_device(name)
    own = getattr(factory(name), "check", None)
    if own is not None:
        try:
            own(**{parameter: given[parameter] for parameter in inspect.signature(own).parameters})
        except (ValueError, OSError):
            raise
        except Exception as error:  # a file that is not what a library expects; in code of one's own, a mistake
            if ":" in name:
                raise
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(
                f"reward {name!r}: what its options {dict(options)} name cannot be read ({why}); download it again"
            ) from error


def _arguments(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What `build(name, **options)` gives the factory, with its defaults; raises ValueError for an unknown option."""
    signature = inspect.signature(factory(name))
    try:
        bound = signature.bind(**options)
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "none"
        raise ValueError(f"options of reward {name!r}: {error}; it takes {takes}") from error
    bound.apply_defaults()
    return dict(bound.arguments)


def _check_device(name: str) -> None:
    try:
        inspect.signature(factory(name)).bind_partial(device="cpu")
    except TypeError as error:
        raise ValueError(
            f"rewards.gpus is not 0, but reward {name!r} takes no `device`, and its models would stay on the CPU; "
            'give it the argument device: str = "cpu" and compute there, or write rewards.gpus=0'
        ) from error


def check_trainable(name: str) -> None:
    """Raise ValueError where the factory says `differentiable = False`: its scores have no gradient to train on."""
    if not getattr(factory(name), "differentiable", True):
        raise ValueError(
            f"reward {name!r} has no gradient and cannot be backpropagated; write gradient: none in its term"
        )


def check_prompts(name: str, options: Mapping[str, Any], texts: Sequence[str]) -> None:
    """Raise ValueError where the factory's own `check_prompts(texts, …)`, if it has one, refuses a prompt.

    Beyond `texts` its parameters are some of the factory's, as those of `check`.
    """
    own = getattr(factory(name), "check_prompts", None)
    if own is not None:
        given = _arguments(name, options) | {"texts": texts}
        own(**{parameter: given[parameter] for parameter in inspect.signature(own).parameters})


def factory(name: str) -> Callable[..., Any]:
    """The class or function that builds the reward registered as `name`."""
    if ":" not in name and name not in REWARDS:
        raise ValueError(nearest(name, list(REWARDS), "reward") + "; rewards.terms and rewards.monitors name them")
    module, _, attribute = REWARDS.get(name, name).partition(":")
    if not module.strip(".") or module.startswith(".") or not attribute:
        raise ValueError(f"reward {name!r} is not understood; write package.module:Class")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"reward {name!r} needs the package {error.name!r}, which is not installed") from error
    except Exception as error:  # whatever a module of one's own does when it is imported
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"reward {name!r}: importing {module} raises {why}") from error
    found = getattr(loaded, attribute, None)
    if found is None:
        raise ValueError(f"reward {name!r}: there is no {attribute!r} in {module}")
    if not callable(found):
        raise ValueError(f"reward {name!r}: {attribute} in {module} is a {type(found).__name__}, not a class to build")
    made: Callable[..., Any] = found
    return made


def needed(reward: str, option: str, path: str | Path | None, what: str) -> Path:
    """The path of a file or folder that a reward is configured with; raises ValueError where there is none.

    what: what it is and where people get it, for the message.
    """
    if path is None:
        raise ValueError(f"reward {reward!r} needs options.{option}: {what}")
    if not isinstance(path, str | Path):
        raise ValueError(f"reward {reward!r}: options.{option} must be a path, got {path!r}; it is {what}")
    found = existing_path(path)
    if found is None:
        raise ValueError(
            f"reward {reward!r}: options.{option} is {str(path)!r}, which does not exist; write the path of {what}"
        )
    return found
