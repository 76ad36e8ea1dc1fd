"""The table: features of PyTorch x modules x backends. A cell is a test; see features/."""

import pytest
import torch
from conftest import SERVED
from features import cells, derivatives, hooks, modules, tracing, transforms  # noqa: F401 (each registers its features)
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten

import fastnorm

CELLS = [
    pytest.param((backend, device), feature, module, id=f"{backend.name}-{device}-{module.name}-{feature.name}")
    for (backend, device), feature, module in cells(SERVED)
]


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    """The inputs are small, and small ones are left to torch."""
    for module in (fastnorm.group, fastnorm.channels_first):
        for name in ("LEAST", "LEAST_POSITIONS", "LEAST_PLAIN_POSITIONS"):
            monkeypatch.setattr(module, name, 1, raising=False)
    monkeypatch.setattr(fastnorm.channels_first, "pays", lambda *_: True)


def outcome(feature, module, x):
    """The results and the state afterwards, or the exception."""
    try:
        results = feature.run(module, x)
    except Exception as e:
        return e, None
    return results, {name: t.detach().clone() for name, t in module.state_dict().items()}


def assert_same(ours, theirs, strides=True):
    (ours, ours_spec), (theirs, theirs_spec) = tree_flatten(ours), tree_flatten(theirs)
    assert ours_spec == theirs_spec
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, torch.Tensor):
            assert type(a) is type(b)
            assert_close(a, b, check_stride=strides, equal_nan=True)
        else:
            assert a == b


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("served", "feature", "module"), CELLS, indirect=["served"])
def test_cell(served, feature, module):
    _, device = served
    if feature.beyond:
        feature.run(module, device)
        return
    outcomes = []
    for m in module.twins(device, feature.dtype):
        torch.manual_seed(0)
        x = module.input(device, feature.dtype)
        outcomes.append(outcome(feature, m, x))
    (ours, our_state), (theirs, their_state) = outcomes
    if feature.refused(m, x):
        assert isinstance(theirs, Exception), "torch.nn can do this by now"
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))
        return
    for result in (theirs, ours):
        if isinstance(result, Exception):
            raise result
    assert_same(ours, theirs, module.strides)
    assert_same(our_state, their_state)
