"""Adopt trained weights into a bundle: models/model.pt and its sha256 in the metadata.

    python scripts/freeze_weights.py bundles/NAME runs/NAME/checkpoint.pt --key ema --half

The checkpoint may be a plain state dict (.pt or .safetensors) or a dict of them (--key picks one). The weights must
fit the bundle's network key by key; those of an encoder alone fit a network that adds nothing to it. With --half they
are stored in float16, which networks convert back when they load them.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import torch

from medvit.bundle import WEIGHTS, Bundle, find_bundle
from medvit.errors import MedvitError, WeightsMismatch
from medvit.models.weights import file_sha256, load_weights, read_state
from medvit.writers.base import atomic


def main() -> None:
    """Parse the command line and call :func:`freeze`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="folder of the bundle")
    parser.add_argument("checkpoint", type=Path, help="file that training wrote")
    parser.add_argument("--key", help="entry of the checkpoint that holds the weights")
    parser.add_argument("--half", action="store_true", help="store float32 weights in float16")
    options = parser.parse_args()

    try:
        freeze(find_bundle(options.bundle), options.checkpoint, options.key, options.half)
    except MedvitError as error:
        raise SystemExit(f"freeze_weights: {error}") from None


def freeze(bundle: Bundle, checkpoint: Path, key: str | None = None, half: bool = False) -> None:
    """Write the weights of ``checkpoint`` into ``bundle``; nothing is touched unless they fit and are finite.

    Raises:
        WeightsMismatch: no tensors under ``key``, other keys or shapes than the network's, NaN or infinite values.
    """
    if not checkpoint.is_file():
        raise WeightsMismatch(f"{checkpoint}: no such checkpoint")
    if checkpoint.suffix == ".safetensors":
        state: dict[str, Any] = dict(read_state(checkpoint))
    else:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if key is not None:
        if key not in state:
            raise WeightsMismatch(f"{checkpoint}: has no entry {key!r}, but {', '.join(map(str, state))}")
        state = state[key]
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsMismatch(
            f"{checkpoint}: holds more than tensors; pick one of {', '.join(map(str, state))} with --key"
        )
    network = bundle.parser().get_parsed_content("network_def")
    encoder = {f"encoder.{key}": value for key, value in state.items()}
    if encoder.keys() == network.state_dict().keys():
        state = encoder
    load_weights(network, state)
    if half:
        state = {k: v.half() if v.dtype == torch.float32 else v for k, v in state.items()}
    # after the conversion: what is above 65504 becomes infinite in float16
    if broken := [k for k, v in state.items() if not v.isfinite().all()]:
        raise WeightsMismatch(f"{checkpoint}: NaN or infinite values in {', '.join(broken[:5])}")
    buffer = io.BytesIO()
    torch.save({k: v.contiguous().clone() for k, v in state.items()}, buffer)
    target = bundle.root / WEIGHTS
    with atomic(target, overwrite=True) as part:
        part.write_bytes(buffer.getvalue())
    metadata = bundle.metadata
    metadata["medvit"]["weights_sha256"] = file_sha256(target)
    with atomic(bundle.root / "configs/metadata.json", overwrite=True) as part:
        part.write_text(json.dumps(metadata, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, sha256 {metadata['medvit']['weights_sha256']}")


if __name__ == "__main__":
    main()
