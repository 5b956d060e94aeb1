"""Adopt trained weights into a bundle: models/model.pt and its sha256 in the metadata.

    python scripts/freeze_weights.py bundles/NAME runs/NAME/checkpoint.pt --key ema --half

The checkpoint may be a plain state dict or a dict of them (--key picks one). The weights must fit the bundle's network
key by key. With --half they are stored in float16, which networks convert back when they load them.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import torch

from medvit.bundle import WEIGHTS, find_bundle
from medvit.errors import WeightsMismatch
from medvit.models.weights import file_sha256, load_weights
from medvit.writers.base import atomic


def main() -> None:
    """Parse the command line and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="folder of the bundle")
    parser.add_argument("checkpoint", type=Path, help="file that training wrote")
    parser.add_argument("--key", help="entry of the checkpoint that holds the weights")
    parser.add_argument("--half", action="store_true", help="store float32 weights in float16")
    options = parser.parse_args()

    bundle = find_bundle(options.bundle)
    state = torch.load(options.checkpoint, map_location="cpu", weights_only=True)
    if options.key:
        if options.key not in state:
            raise WeightsMismatch(f"{options.checkpoint}: has no entry {options.key!r}, but {sorted(state)}")
        state = state[options.key]
    load_weights(bundle.parser().get_parsed_content("network_def"), state)
    if not all(value.isfinite().all() for value in state.values()):
        raise WeightsMismatch(f"{options.checkpoint}: some weights are NaN or infinite")
    if options.half:
        state = {k: v.half() if v.dtype == torch.float32 else v for k, v in state.items()}
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
