"""The documentation says what the code does: its examples run, its tables and links hold."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from agents import sb3_algorithms, train_bandit, train_reinforce
from agents.command_line import parse
from agents.control_options import OPTIONS
from repfusion_env import registry
from repfusion_env.config_loading import check, options, sections

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXAMPLES = (
    "README.md",
    "docs/configuration.md",
    "docs/environment.md",
    "docs/extending.md",
    "docs/fusion.md",
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What each training command refuses, and its short options.
COMMANDS = {
    "agents.train_reinforce": (train_reinforce.conflicts, {}),
    "agents.train_sb3": (sb3_algorithms.conflicts, {"algo": "sb3.algo"}),
    "agents.train_bandit": (train_bandit.conflicts, {"algo": "bandit.algo"}),
    "agents.train_control": (lambda config: [], {}),
}
OWN = {"agents.train_control": OPTIONS}


def _blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [content for found, content in BLOCK.findall(text) if found == language]


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def _rows(page: str) -> dict[str, list[str]]:
    """Table rows by their first cell's code, without the escapes."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].strip("` "): row[1:] for row in cells}


@pytest.mark.parametrize("page", EXAMPLES)
def test_python_examples_run(page, tmp_path, monkeypatch):
    blocks = _blocks(ROOT / page, "python")
    assert blocks
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("students.registry.BACKBONES", BACKBONES := _students())
    monkeypatch.setattr("students.BACKBONES", BACKBONES)
    importlib.invalidate_caches()
    for number, source in enumerate(blocks, 1):
        # A block that is headed by a file's name is that file; the others use it.
        if name := re.match(r"# (\w+\.py)\n", source):
            (tmp_path / name[1]).write_text(source, encoding="utf-8")
        exec(compile(source, f"{page}, python block {number}", "exec"), {"__name__": "example"})


def _students() -> dict[str, object]:
    import students

    return dict(students.BACKBONES)


def test_the_main_commands_stand_alone_in_their_blocks():
    blocks = _blocks(ROOT / "README.md", "sh")
    assert "pip install -e . && python agents/train_reinforce.py\n" in blocks
    assert 'pip install -e ".[test]" && pytest\n' in blocks


def _commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in _blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                found += [(page.name, part.strip()) for part in re.split(r"&&", line)]
        text = _prose(page).replace("\n", " ")
        found += [(page.name, command) for command in re.findall(r"`(python [^`]+)`", text)]
    return [(page, command) for page, command in found if command.startswith("python ")]


@pytest.mark.parametrize(("page", "command"), _commands())
def test_commands_in_the_documentation_are_accepted(page, command, tmp_path, monkeypatch):
    program, *arguments = shlex.split(command, comments=True)[1:]
    if program == "-m":
        program = arguments.pop(0)
        assert importlib.util.find_spec(program) is not None, f"{page}: {command}"
    else:
        assert (ROOT / program).is_file(), f"{page}: {command}"
        program = program.removesuffix(".py").replace("/", ".")
    if program in COMMANDS and "--help" not in arguments:
        (experiment,) = _blocks(ROOT / "docs/configuration.md", "yaml")
        (tmp_path / "my_experiment.yaml").write_text(experiment, encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        conflicts, aliases = COMMANDS[program]
        own = OWN.get(program)
        parse(
            arguments, prog=program, description="", aliases=aliases, conflicts=conflicts, own=own
        )


def test_every_option_stands_in_the_table_with_its_default():
    rows = _rows("docs/configuration.md")
    config = check({})
    known = set()
    for path, item, _ in options():
        section, _, key = path.rpartition(".")
        value = getattr(getattr(config, section) if section else config, key)
        known.add(path)
        assert path in rows, f"docs/configuration.md lacks {path}"
        assert rows[path][1] == f"`{_as_yaml(value)}`", f"default of {path} ({item.name})"
    documented = {name for name in rows if name.partition(".")[0] in {*sections(), *known}}
    assert documented == known


def _as_yaml(value: object) -> str:
    value = list(value) if isinstance(value, tuple) else value
    if value is None:
        return "null"
    # A text needs its quotes in a file of YAML 1.1 alone, where `off` would be a bool.
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip().strip("'")


def test_shorthands_are_those_of_the_sections():
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    for name, kind in sections().items():
        assert f"Shorthand: `{name}` is `{name}.{kind.shorthand}`." in text


def test_the_table_of_algorithms_is_that_of_the_code():
    rows = _rows("README.md")
    for name, algorithm in sb3_algorithms.ALGORITHMS.items():
        library = algorithm.path.partition(":")[0]
        shown = {"stable_baselines3": "Stable-Baselines3", "sb3_contrib": "sb3-contrib"}[library]
        assert rows[name] == [shown, ", ".join(f"`{kind}`" for kind in algorithm.actions)]


DOCUMENTED = {
    "REWARDS": "docs/environment.md",
    "OBSERVATIONS": "docs/environment.md",
    "ACTIONS": "docs/environment.md",
    "LOSSES": "docs/configuration.md",
    "DATASETS": "docs/configuration.md",
    "PROJECTIONS": "docs/configuration.md",
    "TEACHERS": "docs/teachers.md",
}


@pytest.mark.parametrize("table", DOCUMENTED)
def test_every_registered_name_is_documented(table):
    names = set(getattr(registry, table))
    text = (ROOT / DOCUMENTED[table]).read_text(encoding="utf-8")
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_infos_are_those_of_the_trainer():
    from repfusion_env.trainer import StepResult

    rows = _rows("docs/environment.md")
    measured = {item.name for item in dataclasses.fields(StepResult)} - {"reward"}
    assert measured | {"image_id", "timestep", "final_obs", "final_info"} <= {
        name for key in rows for name in key.replace("`", "").split(", ")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if target.startswith(("https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in _anchors(path), f"{page.name}: {target}"


def _anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
