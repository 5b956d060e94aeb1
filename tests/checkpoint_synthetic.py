"""Small networks of ours under the names that public files give their parts."""

import re

import torch

from medvit import create_model

MAE = {
    "in_channels": 3,
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
SWIN = {
    "in_channels": 1,
    "out_channels": 2,
    "feature_size": 4,
    "num_heads": (1, 2, 4, 4),
    "depths": (1, 2, 1, 1),
    "window_size": (2, 3, 2),
    "mlp_ratio": 2.0,
}


def random_model(name, seed=0, **arguments):
    """A network in evaluation mode whose every parameter is random, tables and norms too."""
    torch.manual_seed(seed)
    model = create_model(name, **arguments).eval()
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.randn_like(value) * 0.2)
    return model


def mae_names(model):
    """State dict of our ``mae`` in the names of facebookresearch/mae."""
    names = {}
    for key, value in model.state_dict().items():
        if key.startswith("encoder."):
            names[key.removeprefix("encoder.")] = value
        else:
            names[re.sub(r"^decoder\.", "" if "mask_token" in key else "decoder_", key)] = value
    return names


def ssl_names(model, *, root="", stage="layers{}.0.", mlp="fc"):
    """The encoder of our ``swin_unetr`` in the names of the self-supervised files, with their index buffers."""
    names = {}
    for key, value in model.encoder.state_dict().items():
        key = re.sub(r"^stages\.(\d)\.", lambda m: stage.format(int(m[1]) + 1), key)
        key = key.replace("merge.", "downsample.").replace("mlp.fc", f"mlp.{mlp}")
        names[root + key.replace("relative_bias.table", "relative_position_bias_table")] = value
    for i, st in enumerate(model.encoder.stages):
        for j, block in enumerate(st.blocks):
            window = block.attn.geometry
            index = type(window).full(block.attn.relative_bias.window).relative_index()
            names[f"{root}{stage.format(i + 1)}blocks.{j}.attn.relative_position_index"] = index
    return names


def monai_names(model):
    """State dict of our ``swin_unetr`` (v1, instance norm) in MONAI's names."""
    names = ssl_names(model, root="swinViT.", mlp="linear")
    parts = {"stem": "encoder1", "bottleneck": "encoder10", "skips.0": "encoder2", "skips.1": "encoder3"}
    parts |= {"skips.2": "encoder4", **{f"ups.{i}": f"decoder{5 - i}" for i in range(5)}, "head": "out.conv.conv"}
    for key, value in model.state_dict().items():
        part = next((p for p in parts if key.startswith(f"{p}.")), None)
        if part:
            rest = (
                key.removeprefix(f"{part}.").replace("shortcut.0", "conv3").replace("up.weight", "transp_conv.weight")
            )
            rest = rest.replace(".weight", ".conv.weight").replace("block.", "conv_block.")
            if part == "head":
                rest = key.removeprefix("head.")
            elif not part.startswith("ups"):
                rest = f"layer.{rest}"
            names[f"{parts[part]}.{rest}"] = value
    return names
