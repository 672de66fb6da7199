"""Conversion and export at full size: time against a plain copy of the same bytes, and peak resident memory.

    python benchmarks/convert.py [--folder DIR] [--scale full | tiny] [--out RESULT.md]

Makes a random bfloat16 checkpoint of Qwen-VL-Chat's sizes (19.3 GB, 10 safetensors files), copies it, converts it,
exports the result and compares the export with the original, byte for byte. Each step is a process of its own, begins
with its input out of the page cache and ends when its output is on the disk (fsync). At most three copies lie on the
disk at a time (58 GB); everything is deleted afterwards.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

PIECE = 32 * 2**20
STEPS = ("copy", "convert", "export", "float32", "copy again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        run_step(options.step, options.folder)
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="convert-") as work:
        report = measure(Path(work), options.scale)
    print(report)
    if options.out:
        options.out.write_text(report)


def measure(work: Path, scale: str) -> str:
    """Runs the steps and returns the report."""
    config = full_config() if scale == "full" else tiny_config()
    size = make_checkpoint(work / "source", config, 10 if scale == "full" else 3)
    results = {}
    for step in STEPS:
        if step == "export":
            shutil.rmtree(work / "copy")
        if step == "float32":  # twice the bytes: room is needed
            compare(work / "source", work / "export")
            shutil.rmtree(work / "export")
            shutil.rmtree(work / "convert")
        if step == "copy again":  # the disk may have become faster or slower meanwhile
            shutil.rmtree(work / "float32")
        drop_cache(work)
        print(f"{step} ...", file=sys.stderr)
        command = [sys.executable, __file__, "--step", step, "--folder", str(work)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        results[step] = json.loads(done.stdout)
    return describe(size, results)


def run_step(step: str, work: Path) -> None:
    """One step in a process of its own: prints its seconds and its peak memory."""
    if step.startswith("copy"):
        start = time.perf_counter()
        copy_folder(work / "source", work / "copy")
    else:
        from silkie_jax.checkpoints.convert import convert
        from silkie_jax.checkpoints.export import export

        start = time.perf_counter()
        match step:
            case "convert":
                convert(work / "source", work / "convert")
            case "export":
                export(work / "convert", work / "export")
            case "float32":
                convert(work / "source", work / "float32", dtype="float32")
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


def copy_folder(src: Path, dst: Path) -> None:
    """What `cp` does (the kernel moves the bytes), and then fsync."""
    dst.mkdir()
    for path in sorted(src.iterdir()):
        shutil.copyfile(path, dst / path.name)
        with open(dst / path.name, "rb") as file:
            os.fsync(file.fileno())


def make_checkpoint(folder: Path, config: dict, files: int) -> int:
    """Writes random bfloat16 weights of the given configuration; returns the bytes of weights."""
    from silkie_jax.checkpoints.tensor_files import BFLOAT16, SAFETENSORS_INDEX, index_of, nbytes, plan_shards
    from silkie_jax.models.qwen_vl.config import QwenVLConfig
    from silkie_jax.models.qwen_vl.names import leaves, official_tensors

    tree = leaves(QwenVLConfig.from_dict(config))
    tensors = [(name, BFLOAT16, leaf.official) for name, leaf, _ in official_tensors(tree)]
    size = sum(nbytes(dtype, shape) for _, dtype, shape in tensors)
    needed = 3.1 * size
    folder.mkdir()
    if shutil.disk_usage(folder).free < needed:
        raise SystemExit(f"{folder}: {needed / 1e9:.0f} GB of free disk are needed")
    print(f"making {size / 1e9:.2f} GB of random weights ...", file=sys.stderr)
    shards = plan_shards(tensors, limit=-(-size // files) + max(nbytes(d, s) for _, d, s in tensors) // 2)
    rng = np.random.default_rng(0)
    # Random bits but for the top of the exponent, so that every value is finite; no two pieces are alike.
    block = rng.integers(0, 2**16, PIECE // 2, np.uint16) & 0xBFFF
    for shard in shards:
        shard.write(folder, random_pieces(block, sum(nbytes(*kind) for kind in shard.tensors.values()) // 2, rng))
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(index_of(shards)))
    (folder / "config.json").write_text(json.dumps(config))
    return size


def random_pieces(block: np.ndarray, count: int, rng: np.random.Generator):
    """`count` random numbers: one block, each time rotated and its lower bits flipped differently."""
    while count:
        piece = np.roll(block, rng.integers(len(block))) ^ rng.integers(0, 2**14, dtype=np.uint16)
        yield piece[:count]
        count -= len(piece[:count])


def compare(source: Path, export: Path) -> None:
    """Every tensor of the export has the bytes that it had in the source."""
    from silkie_jax.checkpoints.tensor_files import list_folder

    first, second = list_folder(source).tensors, list_folder(export).tensors
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        other = second[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        count = int(np.prod(tensor.shape))
        for start in range(0, count, PIECE):
            stop = min(count, start + PIECE)
            same = tensor.read(start, stop).view(np.uint16) == other.read(start, stop).view(np.uint16)
            assert same.all(), name


def drop_cache(folder: Path) -> None:
    """Takes all files below a folder out of the page cache, as far as the kernel lets us."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def describe(size: int, results: dict[str, dict[str, float]]) -> str:
    names = {
        "copy": "plain copy (shutil.copyfile, fsync)",
        "copy again": "plain copy, once more at the end",
        "convert": "convert (stored type kept)",
        "export": "export of the converted folder",
        "float32": "convert --dtype float32 (writes twice the bytes)",
    }
    plain = (results["copy"]["seconds"] + results["copy again"]["seconds"]) / 2
    packages = ("numpy", "jax", "flax", "orbax-checkpoint", "tensorstore")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    lines = [
        f"# Conversion of a {size / 1e9:.2f} GB bfloat16 checkpoint, {date.today().isoformat()}",
        "",
        f"`python benchmarks/convert.py`, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}.",
        "Input out of the page cache, output fsynced; the export equals the original byte for byte.",
        "",
        "| step | seconds | GB/s read | time / mean plain copy | peak resident memory |",
        "|---|---|---|---|---|",
    ]
    for step, result in results.items():
        seconds, peak = result["seconds"], result["peak"]
        speed, ratio = size / seconds / 1e9, seconds / plain
        lines.append(f"| {names[step]} | {seconds:.1f} | {speed:.2f} | {ratio:.2f} | {peak / 2**30:.2f} GiB |")
    return "\n".join(lines) + "\n"


def full_config() -> dict:
    from silkie_jax.models.qwen_vl.config import QWEN_VL_CHAT

    return QWEN_VL_CHAT.to_dict() | {"model_type": "qwen", "torch_dtype": "bfloat16", "bf16": True}


def tiny_config() -> dict:
    visual = full_config()["visual"] | {"width": 64, "layers": 3, "heads": 4, "output_dim": 256, "image_size": 280}
    visual["image_start_id"] = 1070
    small = {
        "vocab_size": 1152,
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 64,
    }
    return full_config() | small | {"intermediate_size": 640, "visual": visual}


if __name__ == "__main__":
    main()
