"""Which family a model belongs to, by its files."""

from __future__ import annotations

from repfusion_env.config import TeacherConfig
from repfusion_env.registry import TEACHER_FILES, TEACHERS
from repfusion_env.teachers.base import TeacherError
from repfusion_env.teachers.files.model_files import SHIPPED, ModelFiles, find_model

COMPONENTS = ("transformer", "unet", "")


def family_of(config: TeacherConfig) -> str:
    """The configured family, or for ``auto`` the one that the model's files tell.

    Raises:
        TeacherError: There is no such model, or its files tell no family.
    """
    if config.family != "auto":
        return config.family
    if config.model in SHIPPED:
        return "unet2d"
    files = find_model(config.model, config.revision)
    if files.file is not None:
        return _of_file(files)
    kind = _class_of(files)
    if kind in TEACHER_FILES:
        return TEACHER_FILES[kind]
    named = f"its config.json names '{kind}', which belongs to no known family"
    if kind is None:
        named = (
            "no config.json in it or in its 'transformer/' or 'unet/' names a class of diffusers "
            "or an architecture of timm"
        )
    raise TeacherError(
        f"teacher '{config.model}': {named}; give "
        f"teacher.family: {', '.join(TEACHERS)}, or your own as 'module:function'"
    )


def _of_file(files: ModelFiles) -> str:
    assert files.file is not None
    suffix = files.file.suffix
    if suffix in TEACHER_FILES:
        return TEACHER_FILES[suffix]
    known = [key for key in TEACHER_FILES if key.startswith(".")]
    raise TeacherError(
        f"teacher '{files.model}' is a file; a model is a folder, or a checkpoint "
        f"{', '.join(known)}"
    )


def _class_of(files: ModelFiles) -> str | None:
    for component in COMPONENTS:
        if (files.folder / component / "config.json").is_file():
            config = files.config(component)
            if "_class_name" in config:
                kind = str(config["_class_name"])
                # One old class of diffusers was several networks, told apart by their norm.
                variant = f"{kind}/{config.get('norm_type')}"
                return variant if variant in TEACHER_FILES else kind
            if "architecture" in config:
                return "timm"
    if (files.folder / "model_index.json").is_file():
        return None
    files.place("unet")  # says what is missing
    return None
