"""Loading the components of a diffusers folder, with one-line error messages. Nothing is ever downloaded."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowbp_ray.backbones.finite import check_finite
from flowbp_ray.utils.addresses import expand
from flowbp_ray.utils.text_files import read_json, shown

CONFIG_FILES = {"scheduler": "scheduler_config.json"}  # the others are called config.json


class Folder:
    """A diffusers folder, as written by `DiffusionPipeline.save_pretrained`: one subfolder per component."""

    def __init__(self, path: str | None, backbone: str) -> None:
        """Raises ValueError if the path is empty or there is no such folder."""
        if not path:
            raise ValueError(f"backbone {backbone!r} needs its weights; write backbone.path: a diffusers folder")
        self.path, self.backbone = Path(expand(path)), backbone
        if not self.path.is_dir():
            given = str(self.path)
            hub = f"; `hf download {given} --local-dir DIR` makes one" if re.fullmatch(r"[\w-]+/[\w.-]+", given) else ""
            raise ValueError(f"there is no folder {given}; write backbone.path: a diffusers folder{hub}")

    def config(self, component: str, class_name: str | None = None) -> dict[str, Any]:
        """Read the component's configuration.

        Raises ValueError if its file is missing or is not JSON, or if it is of another class than `class_name`.
        """
        file = self.path / component / CONFIG_FILES.get(component, "config.json")
        if not file.is_file():
            raise ValueError(
                f"{self.path} has no {component}: {component}/{file.name} is missing; download the folder whole"
            )
        config = read_json(file, f"{self.path} has a broken {component}: {file.name}")
        names = [config["_class_name"]] if "_class_name" in config else config.get("architectures") or []
        names = [str(name) for name in (names if isinstance(names, list) else [names])]
        if class_name is not None and class_name not in names:
            found = ", ".join(names) or "a class that it does not name"
            raise ValueError(
                f"{self.path} is no {self.backbone} folder: its {component} is {found}, expected {class_name}"
            )
        return config

    def model(self, component: str, class_name: str, dtype: torch.dtype | None) -> nn.Module:
        """Load the component as a diffusers or transformers model, in eval mode on the CPU.

        dtype: None is the stored one. Raises ValueError if the class is another one, or if weights are missing,
        unreadable or not finite.
        """
        library = "diffusers" if "_class_name" in self.config(component, class_name) else "transformers"
        cls = getattr(importlib.import_module(library), class_name)
        precision = {"torch_dtype": dtype} if library == "diffusers" else {"dtype": dtype or "auto"}
        _quiet(library)
        try:
            model, info = cls.from_pretrained(
                self.path / component, local_files_only=True, output_loading_info=True, **precision
            )
        except Exception as error:  # a broken file makes the libraries raise many types; the user gets one line
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{self.path} has a broken {component}: its weights cannot be read ({reason})") from error
        if info["missing_keys"]:
            example = sorted(info["missing_keys"])[0]
            count = len(info["missing_keys"])
            raise ValueError(f"{self.path} has a broken {component}: {count} weights are missing, e.g. {example}")
        if not check_finite(self.path / component):
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(f"{self.path} has a broken {component}: {name} has values that are not finite")
        return model.eval()

    def text_skeleton(self, component: str, class_name: str) -> nn.Module:
        """The component as a transformers model on the meta device, in the precision that its configuration names."""
        self.config(component, class_name)
        cls = getattr(importlib.import_module("transformers"), class_name)
        with self.described(component), torch.device("meta"):
            model: nn.Module = cls(cls.config_class.from_pretrained(self.path / component, local_files_only=True))
        return model.to(stored_dtype(self.config(component)))

    @contextmanager
    def described(self, component: str) -> Iterator[None]:
        """Where a model cannot be built from its configuration: ValueError with the file's name, on one line."""
        try:
            yield
        except Exception as error:  # a wrong value makes the libraries raise many types; the user gets one line
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            file = f"{component}/{CONFIG_FILES.get(component, 'config.json')}"
            broken = f"{self.path} has a broken {component}"
            raise ValueError(f"{broken}: {file} describes no model ({reason}); download it again") from error

    def tokenizer(self, component: str, class_name: str) -> Any:
        """Load the component as a tokenizer of transformers. Raises ValueError if it is missing or cannot be read."""
        if not (self.path / component).is_dir():
            raise ValueError(f"{self.path} has no {component}: the folder {component}/ is missing; download it too")
        cls = getattr(importlib.import_module("transformers"), class_name)
        try:
            return cls.from_pretrained(self.path / component, local_files_only=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{self.path} has a broken {component}: it cannot be read ({reason}); download it again"
            ) from error


def stored_dtype(config: dict[str, Any]) -> torch.dtype:
    """The precision that a transformers configuration names: `dtype`, formerly `torch_dtype`; fp32 without either."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"config.json names the dtype {shown(name)}; write float32, bfloat16 or float16")
    return dtype


def _quiet(library: str) -> None:
    """Disable the library's progress bars."""
    importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
