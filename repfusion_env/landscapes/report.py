"""What a landscape leaves behind: a machine-readable table, figures, and a page to read.

Shape letters: L layers, R rows of rewards, T timesteps.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from repfusion_env.atomic import write_text
from repfusion_env.landscapes.landscape import Landscape
from repfusion_env.landscapes.naming import teacher_name
from repfusion_env.landscapes.selection import Gap, Selection, Spread
from repfusion_env.landscapes.verdict import verdict

COLUMNS = (
    "layer",
    "timestep",
    "accuracy",
    "strength",
    "reward",
    "train_reward",
    "effective_rank",
    "norm",
    "spread_share",
    "best_for",
    "reconstruction_error",
)


def write_report(found: Landscape, folder: str | Path) -> list[Path]:
    """Write tables, figures and the page into ``folder``, each file atomically.

    Returns:
        The files, the page first.

    Raises:
        OSError: The folder cannot be written.
    """
    from repfusion_env.figures import save_figure
    from repfusion_env.landscapes.figures import all_figures

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(found), indent=1, allow_nan=False) + "\n"
    write_text(folder / "landscape.json", text)
    write_text(folder / "landscape.csv", as_csv(found))
    files = [folder / "landscape.json", folder / "landscape.csv"]
    figures = all_figures(found)
    for name, figure in figures.items():
        files.append(folder / f"{name}.png")
        save_figure(figure, files[-1])
    write_text(folder / "landscape.md", as_markdown(found, list(figures)))
    return [folder / "landscape.md", *files]


def rows(found: Landscape) -> list[dict[str, Any]]:
    """One row for each (layer, timestep), with the keys :data:`COLUMNS`.

    A run's reward belongs to all its layers at once and stands in each one's rows. ``best_for`` is
    the share of held-out images whose best timestep it is.
    """
    table = []
    for place, layer in enumerate(found.layers):
        row = place if len(found.reward_rows) == len(found.layers) else 0
        best = found.selections[row].best_timesteps
        for column, timestep in enumerate(found.timesteps):
            entry: dict[str, Any] = {"layer": layer, "timestep": timestep}
            for name in COLUMNS[2:]:
                if name == "best_for":
                    entry[name] = float((best == timestep).mean())
                elif name == "reconstruction_error":
                    known = not isinstance(found.denoising, str)
                    entry[name] = float(found.denoising.error[column]) if known else None  # type: ignore[union-attr]
                else:
                    source = row if name in ("reward", "train_reward") else place
                    entry[name] = float(getattr(found, name)[source, column])
            table.append(entry)
    return table


def as_csv(found: Landscape) -> str:
    """:func:`rows` as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(found))
    return text.getvalue()


def as_json(found: Landscape) -> dict[str, Any]:
    """Everything but pictures, as plain values; infinities are null."""
    about = {
        name: getattr(found, name)
        for name in (
            "teacher",
            "data",
            "teacher_input",
            "run",
            "layers",
            "widths",
            "timesteps",
            "draws",
            "train_images",
            "heldout_images",
            "labels",
            "reward_kind",
            "reward_rows",
            "seconds",
        )
    }
    denoising = found.denoising
    plain: dict[str, Any] = _plain(
        {
            "verdict": verdict(found),
            **about,
            "main_row": found.reward_rows[found.main],
            "selection": {
                row: _selection(one)
                for row, one in zip(found.reward_rows, found.selections, strict=True)
            },
            "rows": rows(found),
            "cka": dict(zip(found.layers, found.cka, strict=True)),
            "cka_debiased": dict(zip(found.layers, found.cka_debiased, strict=True)),
            "reconstruction_error": denoising if isinstance(denoising, str) else denoising.error,
        }
    )
    return plain


def as_markdown(found: Landscape, figures: list[str]) -> str:
    """The page: verdict, the numbers behind it, and the figures."""
    chosen = found.selection
    layer, place = np.unravel_index(found.accuracy.argmax(), found.accuracy.shape)
    judged = (
        "minus the cross-entropy of a linear head on the layer's pooled feature, one head for each "
        "layer and timestep, on images it never saw"
        if found.run is None
        else f"{found.reward_kind} of the student of `{found.run}`"
    )
    lines = [
        f"# Landscape of `{teacher_name(found)}` on {found.data}",
        "",
        f"**{verdict(found)}**",
        "",
        f"{found.train_images:,} training images ({found.labels:,} labels), "
        f"{found.heldout_images:,} held-out images, {len(found.timesteps)} timesteps, "
        f"{found.draws} noise draw{'' if found.draws == 1 else 's'} of each (image, timestep), "
        f"{found.teacher_input} input. Reward: {judged}.",
        "",
        f"Linear-probe accuracy peaks at {100 * found.accuracy.max():.1f} % for "
        f"`{found.layers[layer]}` at t = {found.timesteps[place]}.",
        "",
        "## Is there something to choose?",
        "",
        f"Gain over the best fixed timestep, chosen on the training images, for "
        f"`{found.reward_rows[found.main]}`:",
        "",
        "| choice | gain | 95 % interval |",
        "| --- | ---: | ---: |",
        _row("each image's best draw (naive: inflated by noise)", chosen.naive),
    ]
    if chosen.split_noise is not None:
        lines.append(_row("each image's own best timestep (split noise)", chosen.split_noise))
    lines += [
        _row(f"chosen from the observation ({_predictor(chosen)})", chosen.observable),
        "",
        "| variance of the reward | whole grid | best "
        f"{len(chosen.top)} timesteps ({chosen.top[0]} to {chosen.top[-1]}) |",
        "| --- | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {getattr(chosen.spread, part):.4g} | "
        f"{getattr(chosen.spread_at_top, part):.4g} |"
        for name, part in (
            ("timestep, the same for all images", "timestep"),
            ("image, at all timesteps", "image"),
            ("image x timestep", "interaction"),
            ("noise draw", "noise"),
            ("signal-to-noise of a decision: which t is best on average", "decision_snr"),
            ("the same: which t suits this image", "sample_snr"),
            ("the same with a perfect baseline per image", "sample_snr_with_baseline"),
        )
    ]
    lines += [
        "",
        _agreement(chosen),
        "",
        "| layer | best probe | at t | best fixed t | reward | split-noise gap | observable gap |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for index, name in enumerate(found.layers):
        one = found.selections[index if len(found.selections) > 1 else 0]
        best = int(found.accuracy[index].argmax())
        split = "" if one.split_noise is None else f"{one.split_noise.gain:+.3f}"
        lines.append(
            f"| `{name}` | {100 * found.accuracy[index, best]:.1f} % | {found.timesteps[best]} | "
            f"{one.best_fixed} | {one.fixed_reward:.3f} | {split} | {one.observable.gain:+.3f} |"
        )
    if isinstance(found.denoising, str):
        lines += ["", found.denoising]
    lines += ["", *[f"![{name}]({name}.png)\n" for name in figures]]
    return "\n".join(lines)


def _row(name: str, one: Gap) -> str:
    return f"| {name} | {one.gain:+.3f} | {one.low:+.3f} to {one.high:+.3f} |"


def _predictor(chosen: Selection) -> str:
    if chosen.predictor.kind == "fixed":
        return "the fixed choice: no predictor beat it in cross-validation"
    return f"{chosen.predictor.kind} regression"


def _agreement(chosen: Selection) -> str:
    if chosen.agreement is None:
        return "Whether best timesteps repeat over noise draws could not be measured."
    return (
        f"Best timesteps by two halves of the noise draws correlate with {chosen.agreement:.2f} "
        "over images (1: they are the images' own, 0: the noise's)."
    )


def _selection(one: Selection) -> dict[str, Any]:
    told = asdict(one)
    for name, spread in (("spread", one.spread), ("spread_at_top", one.spread_at_top)):
        told[name] |= _ratios(spread)
    return told


def _ratios(spread: Spread) -> dict[str, float]:
    return {
        name: getattr(spread, name)
        for name in ("decision_snr", "sample_snr", "sample_snr_with_baseline")
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
