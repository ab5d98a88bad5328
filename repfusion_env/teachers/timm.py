"""Supervised classifiers of timm: the teachers of classic distillation, as a baseline.

A model is a folder as timm writes it (``timm.models.save_for_hf``, read by ``local-dir:``), a hub
id, or timm's own name of a pretrained model (``resnet18.a1_in1k``, with ``teacher.family: timm``).
The classifier head lies behind every layer that can be read, and no label goes in.

Images in [-1, 1] are brought to the mean and deviation of the model's configuration. A classifier
knows no timesteps: the action's timestep is a noise level on the pixels
(:func:`repfusion_env.teachers.reading.noise_process.noise_levels`; 0 is all but clean), or, under
``env.action layer``, its place is taken by the layer.

Shape letters: N lanes, C,H,W image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env.config import TeacherConfig
from repfusion_env.registry import did_you_mean
from repfusion_env.teachers.base import TeacherCard, TeacherError
from repfusion_env.teachers.files.model_files import ModelFiles, find_model
from repfusion_env.teachers.files.weight_files import WeightFiles
from repfusion_env.teachers.reading.family import known_trace, no_options
from repfusion_env.teachers.reading.network import NetworkTeacher, Plan, load_network
from repfusion_env.teachers.reading.noise_process import noise_levels
from repfusion_env.teachers.reading.output_maps import MapReader
from repfusion_env.teachers.reading.tracing import Trace

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class _Facts:
    """What the network, built without memory, tells of itself.

    Attributes:
        reader: From its modules' outputs to maps.
        last_stage: Module path of the last stage before pooling, by timm's account; may be empty.
        recomputed: Buffers that files of older versions hold and the network now makes itself.
        classifier: Module paths of its head.
    """

    reader: MapReader
    last_stage: str
    recomputed: frozenset[str]
    classifier: tuple[str, ...]


class _ClassifierPlan(Plan):
    """How a classifier is built; some of timm's cannot be without memory for their weights."""

    def on_meta(self) -> nn.Module:
        """See :meth:`Plan.on_meta`."""
        try:
            return super().on_meta()
        except TeacherError:
            return self._whole().to("meta")

    def empty(self) -> nn.Module:
        """See :meth:`Plan.empty`."""
        try:
            network = super().empty()
        except TeacherError:
            network = None
        # A buffer that is made on the device of a weight without memory has no values either.
        if network is None or any(buffer.is_meta for buffer in network.buffers()):
            network = self._whole()
            for module in network.modules():
                for name, weight in module.named_parameters(recurse=False):
                    module.register_parameter(name, nn.Parameter(weight.to("meta")))
        return network.requires_grad_(False)

    def _whole(self) -> nn.Module:
        with self._built(), torch.random.fork_rng(devices=[]):
            return self.build().eval().requires_grad_(False)


def load(config: TeacherConfig, *, device: torch.device | str) -> NetworkTeacher:
    """Load a classifier, frozen, as far as the layers need it.

    Raises:
        TeacherError: Files are missing or damaged, weights and configuration do not fit together,
            timm has no such architecture, or it has no such layer.
    """
    files, settings = _open(config)
    plan, facts = _plan(files.model, settings)
    found = _trace(plan, facts, settings)

    def weights(_shapes: object) -> WeightFiles:
        return WeightFiles(
            files.model,
            files.weights(),
            lambda name: "" if name in facts.recomputed else name,
        )

    teacher = load_network(
        plan,
        weights,
        noise_levels(),
        config,
        _card(plan, facts, settings, found),
        found,
        description=json.dumps(settings, sort_keys=True),
    )
    _convert_buffers(teacher.network, teacher.dtype)
    return teacher.to(device)


def describe(config: TeacherConfig) -> TeacherCard:
    """Read the configuration and build the network without memory for its weights.

    Raises:
        TeacherError: See :func:`load`.
    """
    files, settings = _open(config)
    plan, facts = _plan(files.model, settings)
    return _card(plan, facts, settings, _trace(plan, facts, settings))


def _convert_buffers(network: nn.Module, dtype: torch.dtype) -> None:
    """Give biases, masks and positions that are buffers the precision of the weights they meet."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue  # statistics stay as they are: see weight_files.fill
        for name, buffer in module.named_buffers(recurse=False):
            # Pixels are brought to their range in whole precision.
            if buffer.is_floating_point() and not name.startswith("pixel_"):
                module._buffers[name] = buffer.to(dtype)


def _open(config: TeacherConfig) -> tuple[ModelFiles, dict[str, Any]]:
    no_options(config, "timm")
    model = config.model
    if "/" not in model and not Path(model).expanduser().exists():
        files = find_model(_hub_id(model), config.revision)
    else:
        files = find_model(model, config.revision)
    if files.file is not None:
        raise TeacherError(
            f"teacher '{model}' is a file; family 'timm' takes a folder with config.json and "
            "model.safetensors, as timm.models.save_for_hf writes it"
        )
    return files, _settings(files)


def _hub_id(name: str) -> str:
    """Hub id of timm's pretrained model ``name``.

    Raises:
        TeacherError: timm has no such model, or no weights of it on the hub.
    """
    import timm

    found = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model(name) else None
    if found is None:
        raise TeacherError(
            f"teacher '{name}': there is no such folder, and timm has no model of this name."
            f"{did_you_mean(name, timm.list_models())}"
        )
    if not found.hf_hub_id:
        raise TeacherError(f"teacher '{name}': timm has no weights of this model on the hub")
    return str(found.hf_hub_id)


def _settings(files: ModelFiles) -> dict[str, Any]:
    """Architecture, its arguments and ``pretrained_cfg`` of a model in timm's layout.

    Raises:
        TeacherError: It is another layout, or timm has no such architecture.
    """
    import timm

    content = files.config()
    name = content.get("architecture")
    if not isinstance(name, str):
        raise TeacherError(
            f"teacher '{files.model}': its config.json names no architecture, as timm's do"
        )
    if not timm.is_model(name):
        raise TeacherError(
            f"teacher '{files.model}': its config.json names the architecture '{name}', which timm "
            f"does not have.{did_you_mean(name, timm.list_models())}"
        )
    if name.startswith("hiera"):
        raise TeacherError(
            f"teacher '{files.model}': the architecture '{name}' orders its tokens by windows, so "
            "that they are no map; another classifier is needed"
        )
    arguments = dict(content.get("model_args") or {})
    given = content.get("pretrained_cfg")
    pretrained: dict[str, Any] = dict(given if isinstance(given, dict) else content)
    if isinstance(given, dict) and "num_classes" in content:
        pretrained["num_classes"] = content["num_classes"]
    size = [*pretrained.get("input_size", (3, 224, 224))]
    size[0] = arguments.get("in_chans", size[0])
    if "img_size" in arguments:
        side = arguments["img_size"]
        size[1:] = [side, side] if isinstance(side, int) else [*side]
    pretrained["input_size"] = size
    if arguments.get("dynamic_img_size") or arguments.get("strict_img_size") is False:
        pretrained["fixed_input_size"] = False
    for key, default in IMAGENET.items():
        values = [*pretrained.get(key, default)]
        values = values * size[0] if len(values) == 1 else values
        if len(values) != size[0]:
            raise TeacherError(
                f"teacher '{files.model}': its config.json gives {len(values)} values of {key} for "
                f"images of {size[0]} channel{'' if size[0] == 1 else 's'}"
            )
        pretrained[key] = values
    if size[1] != size[2]:
        raise TeacherError(
            f"teacher '{files.model}' takes images of {size[1]}x{size[2]}, and only square "
            "ones are shown"
        )
    return {"architecture": name, "arguments": arguments, "pretrained": pretrained}


def _plan(model: str, settings: dict[str, Any]) -> tuple[Plan, _Facts]:
    def build() -> nn.Module:
        import timm

        network: nn.Module = timm.create_model(
            settings["architecture"],
            pretrained=False,
            pretrained_cfg=_known(settings["pretrained"]),
            **settings["arguments"],
        )
        for name in IMAGENET:
            values = torch.tensor(settings["pretrained"][name], dtype=torch.float32)
            network.register_buffer(f"pixel_{name}", values[:, None, None], persistent=False)
        return network

    channels, height, width = settings["pretrained"]["input_size"]
    plan = _ClassifierPlan(model, build, _run, (channels, height, width))
    # The facts are asked for twice, by describe and load, and cost a network on the meta device.
    key = json.dumps(settings, sort_keys=True)
    if key not in _FACTS:
        _FACTS[key] = _facts(plan)
    return replace(plan, to_map=_FACTS[key].reader), _FACTS[key]


_FACTS: dict[str, _Facts] = {}


@lru_cache(maxsize=1)
def _known_settings() -> frozenset[str]:
    import dataclasses

    from timm.models import PretrainedCfg

    return frozenset(field.name for field in dataclasses.fields(PretrainedCfg))


def _known(pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that timm's own class has: old files carry more."""
    return {name: value for name, value in pretrained.items() if name in _known_settings()}


def _facts(plan: Plan) -> _Facts:
    network: Any = plan.on_meta()
    info = getattr(network, "feature_info", None) or []
    stages = getattr(info, "info", info)
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    patch = (patch, patch) if isinstance(patch, int) else patch
    heads = network.pretrained_cfg.get("classifier") or ()
    return _Facts(
        reader=MapReader(
            prefix=int(getattr(network, "num_prefix_tokens", 0)),
            patch=tuple(patch) if patch is not None else None,
            channels_last=str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC"),
        ),
        last_stage=str(stages[-1].get("module", "")) if len(stages) else "",
        recomputed=frozenset(dict(network.named_buffers()).keys() - network.state_dict().keys()),
        classifier=(heads,) if isinstance(heads, str) else tuple(heads),
    )


def _trace(plan: Plan, facts: _Facts, settings: dict[str, Any]) -> Trace:
    found = known_trace(plan, ["timm", settings])
    shapes = {
        name: shape
        for name, shape in found.shapes.items()
        if not name.startswith(tuple(f"{head}." for head in facts.classifier))
        and name not in facts.classifier
    }
    return replace(found, shapes=shapes)


def _card(plan: Plan, facts: _Facts, settings: dict[str, Any], found: Trace) -> TeacherCard:
    maps = [name for name, shape in found.shapes.items() if shape[1] * shape[2] > 1]
    default = (facts.last_stage,) if facts.last_stage in found.shapes else tuple(maps[-1:])
    return TeacherCard(
        channels=plan.input_shape[0],
        image_size=plan.input_shape[1],
        num_timesteps=len(noise_levels()),
        layers_available=tuple(found.shapes),
        default_layers=default,
        fixed_size=bool(settings["pretrained"].get("fixed_input_size", False)),
        trace=found,
    )


def _run(network: Any, images: Tensor, _conditions: Tensor) -> Any:
    # [-1, 1] -> [0, 1] -> the range that the classifier was trained on, in whole precision.
    pixels = (images.float() * 0.5 + 0.5 - network.pixel_mean) / network.pixel_std
    return network(pixels.to(images.dtype))
