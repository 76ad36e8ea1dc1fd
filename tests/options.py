"""What every option that torch.nn's norms do not have is held to."""

import pytest
import torch
from torch import nn

import fastnorm


def check_not_lost(norm, option, value):
    """By revert, by torch.jit.script, by the conversion to a synchronised norm; and an attribute of torch.nn's is no option."""
    net = nn.Sequential(norm)
    assert f"has an option that torch.nn's has not: {option}" in str(fastnorm.revert(net))
    assert net[0] is norm
    with pytest.raises(RuntimeError, match=f"has no {option}"):
        torch.jit.script(net)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        with pytest.warns(UserWarning, match=f"{type(norm).__name__} is not synchronised"):
            assert fastnorm.SyncBatchNorm.convert_sync_batchnorm(net)[0] is norm
    plain = nn.BatchNorm2d(4)
    setattr(plain, option, value)
    assert f"would take for an option: {option}" in str(fastnorm.convert(plain))
