"""Files: packages with their manifest, and tensors in the safetensors format."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ganglion._errors import Error

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "ganglion/manifest.json"
WEIGHTS = "ganglion/weights.safetensors"
COLUMNS = {
    "step", "images_seen", "ledger", "skipped", "scalars", "epoch", "time", "generation", "world_size",
    "images_per_second", "gpu_memory_bytes", "gpu_utilisation", "profile",
}  # fmt: skip
"""Fixed columns of `metrics.jsonl`."""

# Names of the format, and of PyTorch's kinds.
_KINDS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor]) -> None:
    """Writes float32 tensors in the safetensors format, in order."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        end = at + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        file.write(memoryview(tensor.detach().cpu().contiguous().numpy().reshape(-1)).cast("B"))


def read_tensors(path: os.PathLike[str] | str, wanted: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Reads tensors of a safetensors file: all, or those that are wanted and there."""
    import torch

    path = Path(path)
    try:
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            names = header if wanted is None else [name for name in wanted if name in header]
            found = {}
            for name in names:
                about = header[name]
                begin, end = about["data_offsets"]
                file.seek(8 + length + begin)
                data = bytearray(file.read(end - begin))
                kind = getattr(torch, _KINDS[about["dtype"]])
                flat = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
                found[name] = flat.reshape(about["shape"])
            return found
    except (OSError, ValueError, KeyError, TypeError, struct.error, RuntimeError) as error:
        raise Error(f"{path}: cannot be read as safetensors: {error}") from None


def member(archive: zipfile.ZipFile, ending: str) -> str | None:
    """Name of the member whose path ends so."""
    return next((name for name in archive.namelist() if name == ending or name.endswith("/" + ending)), None)


def add_members(path: Path, manifest: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Adds manifest and first weights to the archive that PyTorch wrote."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        top = archive.namelist()[0].partition("/")[0]

        def entry(name: str) -> zipfile.ZipInfo:
            return zipfile.ZipInfo(f"{top}/{name}", date_time=(1980, 1, 1, 0, 0, 0))

        archive.writestr(entry(MANIFEST), json.dumps(manifest, indent=1) + "\n")
        with archive.open(entry(WEIGHTS), "w", force_zip64=True) as file:
            write_tensors(file, weights)


def read_manifest(path: os.PathLike[str] | str) -> dict[str, Any]:
    """Reads the manifest of a package.

    Raises:
        Error: the file is no package.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = member(archive, MANIFEST)
            if name is None:
                raise Error(f"{path}: has no {MANIFEST}, so it is no package of ganglion.export")
            return json.loads(archive.read(name))
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise Error(f"{path}: is no package: {error}") from None
