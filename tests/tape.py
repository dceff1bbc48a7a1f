"""Records what a step does on the CPU and replays it, as a CUDA graph does on a GPU: for tests without a GPU.

A recording knows operators and the memory they read and write, and nothing of Python. Its replay runs the same
operators on the same memory. Recording has no effect: what it has written is put back. Whatever a CUDA graph refuses is
refused: to look at a value that comes from the inputs or the parameters.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ssesam.trees import tensors_of

_WAITS = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "_unique2", "unique_dim", "masked_select"}


def place(tensor):
    """The memory in which a tensor lies."""
    return tensor.untyped_storage().data_ptr()


class Watch(TorchDispatchMode):
    """Refuses to look at values on the device: at those of some tensors, of parameters, and what comes from them."""

    def __init__(self, inputs=()):
        super().__init__()
        self.on_device = {place(t) for t in inputs}
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors_of((args, dict(kwargs)))
        self.kept += given
        comes_from_device = any(place(t) in self.on_device or isinstance(t, nn.Parameter) for t in given)
        if comes_from_device and func.__name__.partition(".")[0] in _WAITS:
            raise RuntimeError(f"called a synchronizing CUDA operation: {func.__name__}")
        result = self.call(func, args, kwargs, given)
        if comes_from_device:
            self.on_device |= {place(t) for t in tensors_of(result)}
        self.kept += tensors_of(result)
        return result

    def call(self, func, args, kwargs, given):
        return func(*args, **kwargs)


class Tape(Watch):
    """The operators of a function, with the memory that they read and write."""

    def __init__(self, inputs):
        super().__init__(inputs)
        self.calls, self.made, self.before = [], set(), {}

    def call(self, func, args, kwargs, given):
        schema = func._schema.arguments
        pairs = [*zip(args, schema, strict=False), *((kwargs[a.name], a) for a in schema if a.name in kwargs)]
        written = [value for value, a in pairs if a.alias_info and a.alias_info.is_write]
        if "batch_norm" in func.__name__:
            # Its schema does not say that it moves the running statistics.
            written += args[3:5]
        for t in tensors_of(written):
            if place(t) not in self.made and place(t) not in self.before:
                whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
                self.before[place(t)] = whole, whole.clone()
        result = func(*args, **kwargs)
        places = {place(t) for t in given}
        new = [t for t in tensors_of(result) if place(t) not in places]
        self.made |= {place(t) for t in new}
        self.calls.append((func, args, kwargs, result, {id(t) for t in new}))
        return result

    @torch.no_grad()
    def undo(self):
        for whole, copy in self.before.values():
            whole.copy_(copy)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result, new in self.calls:
            again = func(*args, **kwargs)
            for old, now in zip(tensors_of(result), tensors_of(again), strict=True):
                if id(old) in new:
                    old.copy_(now)


class TapeRecorder:
    """Stands in for CUDARecorder."""

    made = 0
    replayed = 0

    def __init__(self, device):
        self.device = device

    @contextmanager
    def apart(self, is_strict):
        with Watch() if is_strict else torch.enable_grad():
            yield

    def record(self, function, inputs):
        tape = Tape(tensors_of(inputs))
        try:
            with tape:
                result = function(inputs)
        finally:
            tape.undo()
        type(self).made += 1

        def replay():
            type(self).replayed += 1
            tape.replay()

        return result, replay
