"""fastnorm.from_keras beside Keras itself, on its torch backend."""

import copy
import os

import numpy as np
import pytest
import torch
from conftest import AT_SPEED, in_force

import fastnorm
from fastnorm.keras import _tensor

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras", reason="Keras is not installed: pip install keras")
if keras.backend.backend() != "torch":
    pytest.skip("Keras has another backend than torch", allow_module_level=True)


@pytest.fixture(params=AT_SPEED)
def served(request):
    """What is made of a layer calls functions that other tests hold every backend to: here, those that take no minutes."""
    with in_force(request.param) as served:
        yield served


BatchNormalization, LayerNormalization = keras.layers.BatchNormalization, keras.layers.LayerNormalization
TENSORS = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
EXACT = {"dtype": "float64"}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # Keras computes in float32 whatever the dtype, and variances as E[x^2] - E[x]^2
MASKED = {"rtol": 1e-4, "atol": 1e-4}  # and adds 1e-7 to a number of values, which a variance of 0 enlarges


def built(layer, shape):
    """With weights that are not those of the beginning."""
    layer.build(shape)
    for variable in layer.weights:
        variable.assign(np.random.default_rng(len(variable.name)).uniform(0.5, 2, variable.shape))
    return layer


def assert_same(layer, x, mask=None, training=True):
    """Output, gradients and, after two calls, the statistics."""
    tolerance = CLOSE if mask is None else MASKED
    norm = fastnorm.from_keras(layer).train(training)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    named = {name: getattr(layer, keras_name, None) for name, keras_name in TENSORS.items()}
    assert {name: t.shape for name, t in norm.state_dict().items()} == {n: v.shape for n, v in named.items() if v is not None}
    for variable in layer.weights:
        variable.value.grad = None
    for _ in range(2):
        extra = {} if mask is None else {"mask": mask}
        y = norm(ours, **extra)
        if isinstance(layer, BatchNormalization):
            expected = layer(theirs, training=training, **extra)
        else:
            expected = layer(theirs)
        torch.testing.assert_close(y, expected, **tolerance)
        dy = torch.randn(y.shape, dtype=y.dtype)
        y.backward(dy)
        expected.backward(dy)
    torch.testing.assert_close(ours.grad, theirs.grad, **tolerance)
    for name, variable in named.items():
        if variable is not None:
            torch.testing.assert_close(norm.state_dict()[name], variable.value.detach(), **tolerance)
            gradient = getattr(norm, name).grad
            if gradient is not None:
                torch.testing.assert_close(gradient, variable.value.grad, **tolerance)
            assert getattr(norm, name).requires_grad == variable.trainable
    return norm


def inputs(*shape, dtype=torch.float64):
    return 3 * torch.randn(shape, dtype=dtype) + 1


affine = pytest.mark.parametrize(("center", "scale"), [(True, True), (False, True), (True, False), (False, False)])


@affine
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("shape", "axis"), [((5, 4), -1), ((5, 4), 1), ((3, 4, 5), -1), ((3, 4, 5), 1), ((3, 4, 5, 2), -2)])
def test_batch_norm(shape, axis, training, center, scale, backend):
    layer = BatchNormalization(axis, momentum=0.9, epsilon=1e-2, center=center, scale=scale, **EXACT)
    assert_same(built(layer, shape), inputs(*shape), training=training)


@pytest.mark.parametrize("axis", [0, -4, 1, 3])
def test_every_axis_of_any_strides(axis, backend):
    layer = built(BatchNormalization(axis, **EXACT), (3, 4, 5, 2))
    assert_same(layer, inputs(2, 5, 4, 3).permute(3, 2, 1, 0))
    assert_same(layer, inputs(3, 5, 2, 4).permute(0, 3, 1, 2))


def test_defaults_and_float32(backend):
    assert_same(built(BatchNormalization(), (6, 4)), inputs(6, 4, dtype=torch.float32))
    assert_same(built(LayerNormalization(), (6, 4)), inputs(6, 4, dtype=torch.float32))


MASKS = {
    "some": torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool),
    "numbers": torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.float64),
    "one": torch.arange(15).view(3, 5) == 7,
    "all": torch.ones(3, 5, dtype=torch.bool),
    "none": torch.zeros(3, 5, dtype=torch.bool),
}


@affine
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, training, axis, center, scale, backend):
    mask = MASKS[name]
    layer = built(BatchNormalization(axis, momentum=0.8, center=center, scale=scale, **EXACT), (3, 5, 4))
    norm = assert_same(layer, inputs(3, 5, 4), mask=mask, training=training)
    if name == "none" and training:  # as if all had been 0
        before = np.random.default_rng(len("moving_mean")).uniform(0.5, 2, norm.running_mean.shape)
        torch.testing.assert_close(norm.running_mean, torch.from_numpy(before) * 0.8**2, rtol=1e-6, atol=0)


def test_a_mask_of_everything_is_no_mask():
    layer = built(BatchNormalization(**EXACT), (3, 5, 4))
    x, norms = inputs(3, 5, 4), [fastnorm.from_keras(layer) for _ in range(2)]
    torch.testing.assert_close(norms[0](x, MASKS["all"]), norms[1](x))
    torch.testing.assert_close(norms[0].state_dict(), norms[1].state_dict())


def test_what_is_masked_does_not_count():
    layer = built(BatchNormalization(**EXACT), (3, 5, 4))
    x, mask = inputs(3, 5, 4), MASKS["some"]
    other = torch.where(mask[..., None], x, 1e6)
    results = [fastnorm.from_keras(layer)(t, mask)[mask] for t in (x, other)]
    assert torch.equal(*results)
    norm = fastnorm.from_keras(layer)
    t = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: copy.deepcopy(norm)(t, mask), (t,))


def test_masks_that_do_not_fit():
    layer = built(BatchNormalization(**EXACT), (3, 5, 4))
    x = inputs(3, 5, 4)
    for call in (lambda: fastnorm.from_keras(layer)(x, torch.ones(3, 5, 4)), lambda: layer(x, mask=torch.ones(3, 5, 4))):
        with pytest.raises(ValueError, match="one dimension less"):
            call()


def test_one_value_per_channel_is_no_error(backend):
    layer = built(BatchNormalization(**EXACT), (1, 4))
    assert_same(layer, inputs(1, 4))


def test_the_running_variance_is_of_biased_variances():
    layer, x = built(BatchNormalization(momentum=0.0, **EXACT), (2, 4)), inputs(2, 4)
    norm = fastnorm.from_keras(layer)
    norm(x)
    torch.testing.assert_close(norm.running_var, x.var(0, correction=0))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_layer_that_is_not_trainable_is_in_evaluation(training):
    layer = built(BatchNormalization(**EXACT), (5, 4))
    layer.trainable = False
    norm = assert_same(layer, inputs(5, 4), training=training)
    assert not any(p.requires_grad for p in norm.parameters())
    assert torch.equal(norm.running_mean, fastnorm.from_keras(layer).running_mean)


LAYERS = [
    ((5, 4), -1),
    ((5, 4), 1),
    ((3, 4, 5), [-1]),
    ((3, 4, 5), [1, 2]),
    ((3, 4, 5), (-2, -1)),
    ((3, 4, 5, 2), [1, 3]),
    ((3, 4, 5, 2), [3, 1]),
    ((3, 4, 5, 2), [0, 2]),
    ((3, 4, 5, 2), [1, -1]),
]


@affine
@pytest.mark.parametrize(("shape", "axis"), LAYERS)
def test_layer_norm(shape, axis, center, scale, backend):
    layer = LayerNormalization(axis, epsilon=1e-2, center=center, scale=scale, **EXACT)
    assert_same(built(layer, shape), inputs(*shape))


@pytest.mark.parametrize("axis", [1, [0, 1]])
def test_axes_that_keras_fails_at(axis, backend):
    """Keras's torch backend takes adjacent axes for the last ones."""
    x = inputs(3, 4, 5)
    layer = LayerNormalization(axis, **EXACT)
    layer.build(x.shape)
    with pytest.raises(RuntimeError):
        layer(x)
    norm, dims = fastnorm.from_keras(layer), (axis if isinstance(axis, list) else [axis])
    expected = (x - x.mean(dims, keepdim=True)) / (x.var(dims, correction=0, keepdim=True) + layer.epsilon).sqrt()
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.filterwarnings("ignore:You passed `rms_scaling=True`")
@pytest.mark.parametrize(("shape", "axis"), [((5, 4), -1), ((3, 4, 5, 2), [1, 3])])
@pytest.mark.parametrize("scale", [True, False])
def test_rms_scaling(shape, axis, scale):
    layer = LayerNormalization(axis, scale=scale, rms_scaling=True, **EXACT)
    norm = assert_same(built(layer, shape), inputs(*shape))
    assert norm.bias is None
    assert norm.weight is not None  # Keras has one whatever `scale` says


@pytest.mark.filterwarnings("ignore:You passed `rms_scaling=True`")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("what", ["batch", "masked", "layer", "rms"])
def test_half_types_are_no_worse_than_keras(what, dtype, backend):
    """Statistics in float32, and the result in the input's dtype."""
    cls = BatchNormalization if what in ("batch", "masked") else LayerNormalization
    x = inputs(8, 50, 6).to(dtype)
    options = {"rms_scaling": True} if what == "rms" else {}
    policy = {torch.bfloat16: "mixed_bfloat16", torch.float16: "mixed_float16"}[dtype]
    layer, exact = (built(cls(dtype=d, **options), x.shape) for d in (policy, "float64"))
    mask = (torch.arange(400).view(8, 50) % 3 == 0,) if what == "masked" else ()
    norm, wide = fastnorm.from_keras(layer), fastnorm.from_keras(exact)
    truth = wide(x.double(), *mask)
    y = norm(x, *mask)
    calls = {"training": True, "mask": mask[0] if mask else None} if cls is BatchNormalization else {}
    expected = layer(x, **calls)
    assert y.dtype == expected.dtype == dtype
    assert (y - truth).abs().max() <= (expected - truth).abs().max() * (1 + torch.finfo(dtype).eps)


def test_the_tensors_are_copies_and_the_module_one_of_torchs(tmp_path):
    layer = built(BatchNormalization(2, momentum=0.9, **EXACT), (3, 5, 4))
    norm = fastnorm.from_keras(layer)
    before = layer.moving_mean.numpy().copy()
    norm(inputs(3, 5, 4))
    assert (layer.moving_mean.numpy() == before).all()
    assert norm.training
    other = copy.deepcopy(norm)
    torch.save(norm.state_dict(), tmp_path / "norm.pt")
    other.load_state_dict(torch.load(tmp_path / "norm.pt"))
    torch.testing.assert_close(other.state_dict(), norm.state_dict())
    assert repr(norm) == "KerasBatchNorm(4, axis=2, momentum=0.9, eps=0.001, frozen=False)"
    assert repr(fastnorm.from_keras(built(LayerNormalization(), (2, 3)))) == "KerasLayerNorm(axis=(-1,), eps=0.001)"


def test_a_layer_that_does_not_learn_makes_a_norm_that_does_not():
    layer = built(LayerNormalization(**EXACT), (5, 4))
    layer.trainable = False
    assert_same(layer, inputs(5, 4))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_variables_of_other_backends(dtype):
    """Which have numpy arrays, or what becomes one."""
    import ml_dtypes

    class Variable:
        value = np.linspace(0.1, 1, 5).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

        def numpy(self):
            return self.value

    variable = Variable()
    variable.dtype = dtype
    tensor = _tensor(variable)
    assert tensor.dtype == getattr(torch, dtype)
    assert (tensor.double().numpy() == variable.value.astype("float64")).all()


# What is refused


class OwnCall(BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training, mask) + 1


class Named(LayerNormalization):
    pass


def test_subclasses():
    assert_same(built(Named(**EXACT), (5, 4)), inputs(5, 4))
    with pytest.raises(TypeError, match="OwnCall has a call of its own"):
        fastnorm.from_keras(built(OwnCall(), (5, 4)))


@pytest.mark.parametrize("what", [None, torch.nn.LayerNorm(4), keras.layers.Dense(4), LayerNormalization])
def test_other_objects(what):
    with pytest.raises(TypeError, match="BatchNormalization and LayerNormalization are rebuilt, not a "):
        fastnorm.from_keras(what)


def test_layers_that_cannot_be_rebuilt():
    with pytest.raises(ValueError, match="is not built"):
        fastnorm.from_keras(BatchNormalization())
    with pytest.raises(ValueError, match="has renorm=True"):
        fastnorm.from_keras(built(BatchNormalization(renorm=True), (5, 4)))


def test_regularizers_and_constraints_are_not_copied():
    layer = built(LayerNormalization(gamma_regularizer="l2", beta_constraint="non_neg"), (5, 4))
    with pytest.warns(UserWarning, match="gamma_regularizer and beta_constraint not copied"):
        fastnorm.from_keras(layer)
