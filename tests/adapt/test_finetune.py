import pytest
from torch import nn

from medvit.adapt.finetune import freeze, matching, train_only


def network():
    return nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "head": nn.Linear(2, 3)})


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_freeze_says_what_it_froze_and_leaves_the_others():
    model = network()
    assert freeze(model, [r"encoder\.0\..*"]) == ["encoder.0.weight", "encoder.0.bias"]
    assert trained(model) == ["encoder.1.weight", "encoder.1.bias", "head.weight", "head.bias"]
    freeze(model, [r".*\.bias"])
    assert trained(model) == ["encoder.1.weight", "head.weight"]


def test_train_only_freezes_all_others():
    model = network()
    freeze(model, [r"head\..*"])
    assert train_only(model, [r"head\..*", r"encoder\.1\.bias"]) == trained(model)
    assert trained(model) == ["encoder.1.bias", "head.weight", "head.bias"]
    assert train_only(model, []) == trained(model) == []


def test_patterns_match_whole_names_and_must_match_some():
    names = ["a.weight", "ab.weight", "b.bias"]
    assert matching(names, [r"a.*"]) == ["a.weight", "ab.weight"]
    assert matching(names, [r"b\..*", r"a\..*"]) == ["a.weight", "b.bias"]
    with pytest.raises(ValueError, match=r"the pattern 'weight' matches none of the names a.weight, ab.weight, b.bias"):
        matching(names, [r"a.*", "weight"])
    with pytest.raises(ValueError, match=r"must be a regular expression, got '\('"):
        matching(names, ["("])
    with pytest.raises(ValueError, match=r"the names n0, n1, n2, ..., n6, n7, n8"):
        matching([f"n{i}" for i in range(9)], ["x"])


def test_nothing_changes_where_a_pattern_is_wrong():
    model = network()
    with pytest.raises(ValueError, match="matches none"):
        train_only(model, [r"head\..*", "tail"])
    assert len(trained(model)) == 6
