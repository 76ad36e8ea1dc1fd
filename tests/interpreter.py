"""Makes Triton's CPU interpreter (TRITON_INTERPRET=1) faithful enough for numeric tests; install() before the first launch.

1. float32 -> bfloat16 truncates, and float64 -> bfloat16 is garbage; a GPU rounds to nearest even.
2. A sum over the first axis is numpy's running sum, and what is reduced by a function of ours is so element by element; a GPU
   goes by a tree, whose error does not grow with the length.
3. triton 3.6: a multiplication and an addition fused are rounded twice; a GPU rounds once.
4. triton 3.6 with numpy >= 2.4: range(tensor) raises "only 0-dimensional arrays can be converted".

Some things are right in the interpreter, but slow: bfloat16 -> float32; it patches triton.language anew for every function that
a kernel calls, though the kernel's own launch has patched it already; types, shapes and numpy's dtypes are made anew for every
operation (_remember_types); and what is done to integers is done again in 64 bits, for an assertion that is left out.
"""

from types import SimpleNamespace

import numpy as np


def install():
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter, "_fastnorm_repaired", False):
        return
    interpreter._fastnorm_repaired = True
    convert_float, patch_tensor = interpreter._convert_float, interpreter._patch_lang_tensor
    patch_lang, unpatched = interpreter._patch_lang, SimpleNamespace(restore=lambda: None)
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def convert(x, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            return _to_bfloat16(x)
        if source == tl.bfloat16 and target == tl.float32:
            return np.asarray(x).view(np.uint16).astype(np.uint32) << np.uint32(16)
        return convert_float(x, source, target, rounding)

    def cast_impl(self, x, target):
        if x.dtype.scalar == tl.float64 and target.scalar == tl.bfloat16:
            x = cast(self, x, tl.float32)
        return cast(self, x, target)

    def patch(tensor, *scope):
        patch_tensor(tensor, *scope)
        index = lambda self: int(np.asarray(self.handle.data).item())
        if scope:  # triton >= 3.7 undoes its patches through a scope
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    def tree_sum(self, x):
        return self.to_tensor(_tree_sum(x.handle.data, self.axis, self.keep_dims), x.dtype)

    def fused(self, x, y, z):
        wider = np.float64 if x.data.dtype == np.float32 else np.longdouble
        exact = x.data.astype(wider) * y.data.astype(wider) + z.data.astype(wider)
        return interpreter.TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

    def tree_reduce(self, input):
        parts = [np.moveaxis(t.handle.data, self.axis, 0) for t in input]
        while len(parts[0]) > 1:
            half = len(parts[0]) // 2
            halves = [self.to_tensor(x, t.dtype) for part in (slice(half), slice(half, None))
                      for x, t in zip([p[part] for p in parts], input, strict=True)]  # fmt: skip
            parts = [t.handle.data for t in self.combine_fn.fn(*halves)]
        parts = [np.moveaxis(x, 0, self.axis) if self.keep_dims else x[0] for x in parts]
        return [self.to_tensor(x, t.dtype) for x, t in zip(parts, input, strict=True)]

    def patch_once(fn):
        modules = [m for m in fn.__globals__.values() if m is tl or m is tl.core]
        return patch_lang(fn) if any(tl.core.is_builtin(m.load) for m in modules) else unpatched

    interpreter._convert_float, interpreter._patch_lang_tensor, interpreter._patch_lang = convert, patch, patch_once
    builder.cast_impl = cast_impl
    if not hasattr(interpreter._interpreter, "fma_fp64"):
        builder.create_fma = fused
    interpreter.ReduceOps.sum, interpreter.ReduceOps.generic_reduce = tree_sum, tree_reduce
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    _remember_types(tl, interpreter)


def _remember_types(tl, interpreter):
    """Equal types share what they hold: a third to a half of an operation's time in the interpreter goes into making it."""
    block_init, tensor_init, equal = tl.block_type.__init__, tl.tensor.__init__, tl.tuple.__eq__
    semantic = interpreter.interpreter_semantic
    blocks, dtypes, true = {}, {}, tl.constexpr(True)

    def make_block(self, element_ty, shape):
        key = element_ty.name, *(getattr(n, "value", n) for n in shape)
        if key not in blocks:
            block_init(self, element_ty, shape)
            blocks[key] = self.__dict__
        self.__dict__ = blocks[key]

    def make_tensor(self, handle, type):
        of_type = type.__dict__.get("of_tensors")
        if of_type is None:
            tensor_init(self, handle, type)
            of_type = type.of_tensors = {k: v for k, v in self.__dict__.items() if k != "handle"}
        self.__dict__.update(of_type, handle=handle)

    def tuples_equal(self, other):
        values = getattr(other, "values", other)
        return true if isinstance(values, list) and self.values == values else equal(self, other)

    def numpy_dtype(dtype, make=interpreter._get_np_dtype):
        scalar = dtype.scalar
        if scalar.name not in dtypes:
            dtypes[scalar.name] = make(scalar)
        return dtypes[scalar.name]

    def broadcast(a, b, change=semantic.broadcast_impl_value):
        alike = a.type.is_block() and b.type.is_block() and list(a.shape) == list(b.shape)
        return (a, b) if alike else change(a, b)

    tl.block_type.__init__, tl.tensor.__init__, tl.tuple.__eq__ = make_block, make_tensor, tuples_equal
    semantic.broadcast_impl_value, interpreter._get_np_dtype = broadcast, numpy_dtype


def _to_bfloat16(x):
    """Round to nearest even; every NaN becomes the quiet one."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(np.shape(x))


def _tree_sum(x, axis, keep_dims):
    if axis is None:
        x, axis = np.reshape(x, -1), 0
    x = np.moveaxis(x, axis, 0)
    while len(x) > 1:  # a power of two, as every block size of Triton
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return np.moveaxis(x, 0, axis) if keep_dims else x[0]
