"""Networks by name."""

import subprocess
import sys

import pytest

from medvit import create_model, list_models, registry


@pytest.fixture
def own_registry(monkeypatch):
    """The registry, to be changed freely."""
    registry.model_class("swin_unetr")
    models = dict(registry._MODELS)
    monkeypatch.setattr(registry, "_MODELS", models)
    return models


def test_names_are_sorted_and_complete(own_registry):
    own_registry["a_first"] = own_registry["zz_last"] = object
    names = list_models()
    assert names == sorted(names)
    assert {"a_first", "swin_unetr", "zz_last"} <= set(names)


def test_arguments_reach_the_network():
    network = create_model("swin_unetr", in_channels=2, out_channels=5, spatial_dims=2, feature_size=12)
    assert type(network).__name__ == "SwinUNETR"
    assert (network.in_channels, network.head.out_channels) == (2, 5)


def test_a_decorated_builder_is_returned_as_it_was_and_found_by_name(own_registry):
    @registry.register("tiny")
    def build(width):
        return f"width {width}"

    assert build(3) == create_model("tiny", width=3) == "width 3"
    assert "tiny" in list_models()


def test_a_name_is_given_once(own_registry):
    with pytest.raises(ValueError, match=r"^a model named 'swin_unetr' is registered already: <class '.*SwinUNETR'>$"):
        registry.register("swin_unetr")(object)
    assert own_registry["swin_unetr"] is not object


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"^no model named 'swin_unet'; did you mean 'swin_unetr'\?$"):
        create_model("swin_unet")


def test_a_name_like_no_other_lists_all():
    with pytest.raises(ValueError, match=r"^no model named 'resnet'; there are \[.*'swin_unetr'.*\]$"):
        create_model("resnet")


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="no_such"):
        create_model("swin_unetr", in_channels=1, out_channels=2, no_such=1)


def test_architectures_are_imported_on_first_use_only():
    code = (
        "import sys, medvit; assert 'torch' not in sys.modules; "
        "medvit.list_models(); assert 'torch' not in sys.modules; "
        "medvit.registry.model_class('swin_unetr'); assert 'medvit.models.swin_unetr' in sys.modules; "
        "assert not {'monai', 'timm', 'medvit.models.vit'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", list_models())
def test_every_network_says_what_it_is(name):
    assert registry.model_class(name).__doc__
