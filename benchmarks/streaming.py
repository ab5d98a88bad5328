"""Whether training waits for images that are decoded while it goes on, and how fast they decode.

    python -m benchmarks.streaming                 # about four minutes on four cores
    python -m benchmarks.streaming --smoke         # does it run? the figures mean nothing

Stand-ins for photographs, JPEGs of 500x375 as ImageNet has them, lie in a folder and in shards. The
on-line step of :mod:`benchmarks.throughput` (bf16, channels-last, default reward) takes turns on
the same images held on the device, streamed from the folder and streamed from the shards. Steps are
decoded only one ahead, and a sample has eight, so that little is decoded while another line's turn
is timed. Rates of decoding are those of ``data.decode_threads`` 1, 2, 4, ... while nothing else is
done, read by the bank as a run reads them.

The result; a spread is ``{"median", "min", "max"}``::

    {
      "lanes": 64,
      "images": 512,                              # of 500x375, each line's training images
      "bytes": 71234.5,                           # of one JPEG, the mean
      "cores": 4,
      "threads": 4,                               # that decode in the lines
      "side": 32,                                 # pixels of the decoded squares, in the lines
      "lines": {"resident": {"decisions_per_second": spread, "seconds_per_step": [...]},
                "folder": {..., "ratio": spread, "waiting": 0.004}, "shards": {...}},
                                                  # ratio: to resident, round by round; waiting:
                                                  # part of its time that the line waited
      "decoding": {"64": {"1": {"images_per_second": spread, "core_seconds": 0.0008}, ...},
                   "224": {...}},                 # by side and threads; core seconds of one image
      "index": {"folder": 100000.0, "shards": 20000.0}   # images that are listed a second
    }

Shape letters: N lanes, M images.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.material import DDPM_CIFAR10_UNET, TINY_UNET, Material, make_material
from benchmarks.settings import Size, default_reward, environment, experiment, random_actions
from benchmarks.timing import Line, interleave, machine, machine_lines, ratios, spread
from repfusion_env.atomic import write_text
from repfusion_env.config import DataConfig, ExperimentConfig
from repfusion_env.config_loading import check, merge, to_dict
from repfusion_env.data import load_data
from repfusion_env.data.decoding_ahead import usable_cores
from repfusion_env.data.streamed import StreamedImages
from repfusion_env.devices import resolve_device

Say = Callable[[str], None]
WIDTH, HEIGHT = 500, 375
DIFFERENT = 64  # photographs; the files are copies of these
CLASSES = 10
IN_A_SHARD = 128
STEPS = 8
MOST_ROUNDS = 5
SIDES = (64, 224)
SOURCES = {"folder": "folder", "shards": "webdataset"}


@dataclass(frozen=True)
class Photographs:
    """The same images in two places.

    Attributes:
        folder: ``train/<class>/*.jpg`` and ``val/...``.
        shards: ``train-*.tar`` and ``val-0.tar``.
        count: M for training.
        bytes: Of a file, the mean.
    """

    folder: Path
    shards: Path
    count: int
    bytes: float

    def config(self, source: str, **options: Any) -> DataConfig:
        """Their configuration; ``source`` is one of :data:`SOURCES`."""
        path = self.folder if source == "folder" else self.shards
        return DataConfig(name=SOURCES[source], path=str(path), channels=3, **options)


def photographs(root: Path, count: int) -> Photographs:
    """Write ``count`` images for training and a few held-out ones under ``root``."""
    random = np.random.default_rng(0)
    files = [_photograph(random) for _ in range(min(DIFFERENT, count))]
    folder, shards = root / "folder", root / "shards"
    shards.mkdir(parents=True)
    for part, images in (("train", count), ("val", 16)):
        for number in range(images):
            path = folder / part / f"class{number % CLASSES}" / f"{number:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[number % len(files)])
        for first in range(0, images, IN_A_SHARD):
            with tarfile.open(shards / f"{part}-{first // IN_A_SHARD:04}.tar", "w") as archive:
                for number in range(first, min(first + IN_A_SHARD, images)):
                    label = str(number % CLASSES).encode()
                    for suffix, content in (("jpg", files[number % len(files)]), ("cls", label)):
                        member = tarfile.TarInfo(f"{number:06}.{suffix}")
                        member.size = len(content)
                        archive.addfile(member, BytesIO(content))
    return Photographs(folder, shards, count, sum(map(len, files)) / len(files))


def measure(size: Size, device: str = "cpu", say: Say = lambda text: None) -> dict[str, Any]:
    """Time resident and streamed steps, and decoding alone.

    Args:
        size: Lanes, rounds and student.
        device: As in configurations.
        say: Told how far it is.

    Returns:
        What the module's docstring describes.
    """
    unet = TINY_UNET if size.smoke else DDPM_CIFAR10_UNET
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        images = photographs(root, 2 * size.images)
        say(f"wrote {images.count} photographs twice")
        material = make_material(root, unet, size.images)
        lines = _lines(size, device, material, images, unet["sample_size"], say)
        gc.collect()
        threads = [count for count in (1, 2, 4, 8, 16) if count <= usable_cores()]
        if size.smoke:
            threads = threads[:1]
        decoding = {
            str(side): {str(count): _decoding(images, side, count, size) for count in threads}
            for side in SIDES
        }
        say("decoded alone")
        return {
            "lanes": size.lanes,
            "images": images.count,
            "bytes": images.bytes,
            "cores": usable_cores(),
            "threads": min(16, usable_cores()),
            "side": unet["sample_size"],
            "lines": lines,
            "decoding": decoding,
            "index": {source: _listed(images, source) for source in SOURCES},
        }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    rows = [
        f"Images, N = {result['lanes']}, JPEGs of {WIDTH}x{HEIGHT} ({result['bytes'] / 1000:.0f} "
        f"kB) brought to {result['side']}x{result['side']} by {result['threads']} threads on "
        f"{result['cores']} cores that also compute:",
        "",
        "| images | decisions/s | of resident | waiting for images |",
        "| --- | --- | --- | --- |",
    ]
    for name, line in result["lines"].items():
        speed = line["decisions_per_second"]
        ratio = f"{line['ratio']['median']:.0%}" if "ratio" in line else "100%"
        waiting = f"{line['waiting']:.1%}" if "waiting" in line else "-"
        shown = name if name == "resident" else f"streamed, {name}"
        rows.append(
            f"| {shown} | {speed['median']:.1f} ({speed['min']:.1f} to {speed['max']:.1f}) | "
            f"{ratio} | {waiting} |"
        )
    rows += ["", "| decoding alone | threads | images/s | ms of a core each |"]
    rows.append("| --- | --- | --- | --- |")
    for side, by_threads in result["decoding"].items():
        for threads, found in by_threads.items():
            rows.append(
                f"| to {side}x{side} | {threads} | {found['images_per_second']['median']:,.0f} | "
                f"{1000 * found['core_seconds']:.2f} |"
            )
    listed = ", ".join(f"{name} {rate:,.0f}" for name, rate in result["index"].items())
    return "\n".join([*rows, "", f"Images listed per second before training begins: {listed}."])


def _photograph(random: np.random.Generator) -> bytes:
    """Smooth colours with some grain: as many bytes, and as long to decode, as a photograph."""
    coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    grain = random.integers(-14, 15, (HEIGHT, WIDTH, 3))
    pixels = (np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def _lines(
    size: Size, device: str, material: Material, images: Photographs, side: int, say: Say
) -> dict[str, Any]:
    plain = experiment(default_reward("fast"), material, size, device)
    where = resolve_device(device)
    configs: dict[str, ExperimentConfig] = {}
    for name in ("resident", *SOURCES):
        data: dict[str, Any] = {"image_size": side, "prefetch": 1}
        source = "folder" if name == "resident" else name
        data["storage"] = "resident" if name == "resident" else "stream"
        chosen = asdict(images.config(source, **data))
        configs[name] = check(merge(to_dict(plain), {"data": chosen}))
    runners = {name: _Runner(config) for name, config in configs.items()}
    timings = interleave(
        [Line(name, runner.step) for name, runner in runners.items()],
        rounds=min(size.rounds, MOST_ROUNDS),
        steps=2 if size.smoke else STEPS,
        device=where,
        progress=lambda text: say(f"streaming: {text}"),
    )
    found: dict[str, Any] = {}
    for name, timing in timings.items():
        found[name] = {
            "decisions_per_second": spread([size.lanes / s for s in timing.seconds]),
            "seconds_per_step": list(timing.seconds),
        }
        if name != "resident":
            found[name]["ratio"] = spread(ratios(timing, timings["resident"]))
            found[name]["waiting"] = runners[name].waiting
    return found


class _Runner:
    """Steps of one environment, with the seconds that they wait for images."""

    def __init__(self, config: ExperimentConfig) -> None:
        self._env, trainer = environment(config)
        self._actions = random_actions(self._env, 64)
        self._images = trainer.parts.train.images
        self._seconds = self._waited = 0.0
        self._cuda = self._env.device.type == "cuda"

    def step(self, number: int) -> None:
        """One step; a CUDA device is waited for, as what it still had to do is no waiting."""
        before, started = self._so_far(), time.perf_counter()
        self._env.step(self._actions[number % len(self._actions)])
        self._waited += self._so_far() - before
        self._seconds += time.perf_counter() - started

    @property
    def waiting(self) -> float:
        """Part of the time that was spent waiting for images."""
        return self._waited / self._seconds

    def _so_far(self) -> float:
        if self._cuda:
            torch.cuda.synchronize(self._env.device)
        return self._images.waited if isinstance(self._images, StreamedImages) else 0.0


def _decoding(images: Photographs, side: int, threads: int, size: Size) -> dict[str, Any]:
    count = 16 if size.smoke else 256
    config = images.config("folder", image_size=side, storage="stream", decode_threads=threads)
    bank, _ = load_data(config)
    ids = torch.arange(min(count, len(bank)))
    rates, cores = [], []
    computing = torch.get_num_threads()
    # Its threads wait by spinning: they would take cores from the decoding and count as decoding.
    torch.set_num_threads(1)
    try:
        for _ in range(2 if size.smoke else 4):
            started, spent = time.perf_counter(), time.process_time()
            for piece in bank.announced(ids.split(32)):
                bank.pixels(piece)
            rates.append(len(ids) / (time.perf_counter() - started))
            cores.append((time.process_time() - spent) / len(ids))
    finally:
        torch.set_num_threads(computing)
    # The first pass also starts the threads.
    return {"images_per_second": spread(rates[1:]), "core_seconds": min(cores[1:])}


def _listed(images: Photographs, source: str) -> float:
    config = images.config(source, image_size=32, storage="stream", heldout_limit=1)
    started = time.perf_counter()
    bank, _ = load_data(config)
    return len(bank) / (time.perf_counter() - started)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streaming", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything here")
    parser.add_argument("--smoke", action="store_true", help="tiny networks; seconds")
    parser.add_argument("--rounds", type=int, default=5, help="samples per line (default: 5)")
    parser.add_argument("--lanes", type=int, default=64, help="N (default: 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<index>")
    chosen = parser.parse_args(argv)
    for name in ("rounds", "lanes"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name}: {getattr(chosen, name)} given; it must be 1 or more")
    if chosen.json is not None and not chosen.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no folder '{chosen.json.parent}'")
    size = Size(chosen.lanes, chosen.rounds, STEPS, "resnet18")
    if chosen.smoke:
        size = Size(4, 2, 1, "small_cnn", smoke=True)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{text} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)

    try:
        result = measure(size, chosen.device, say)
    except ValueError as error:
        parser.error(str(error))
    facts = machine(resolve_device(chosen.device))
    print("\n".join([*machine_lines(facts), "", table(result)]))
    if chosen.json is not None:
        kept = {"machine": facts, "smoke": size.smoke} | result
        write_text(chosen.json, json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
