"Exceptions at every line and every call of torch, for the tests that nothing is lost by them."
import sys

import torch
from torch.overrides import TorchFunctionMode


class Stop(BaseException): "What the tests inject: nobody expects it, as nobody expects Ctrl-C"


class _Calls(TorchFunctionMode):
    "Raises in place of, or after, the k-th call of a torch function"
    def __init__(self, k, after): self.k, self.after, self.n = k, after, 0
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch._C._set_grad_enabled: return func(*args, **(kwargs or {}))    # it never fails, and would not be set back
        self.n += 1
        if self.n == self.k and not self.after: raise Stop
        out = func(*args, **(kwargs or {}))
        if self.n == self.k: raise Stop
        return out


class _Lines:
    "Raises before the k-th line that runs in some files"
    def __init__(self, k, files): self.k, self.files, self.n = k, files, 0
    def trace(self, frame, event, arg):
        if not frame.f_code.co_filename.endswith(self.files): return None
        if event == "line":
            self.n += 1
            if self.n == self.k: raise Stop
        return self.trace
    def __enter__(self): self.was = sys.gettrace(); sys.settrace(self.trace); return self
    def __exit__(self, *error): sys.settrace(self.was)


FILES = ("stored.py", "worn.py", "injection.py", "vocabulary.py", "layers.py", "checkpoints.py")
MODES = {"lines": lambda k: _Lines(k, FILES), "calls": lambda k: _Calls(k, False), "after calls": lambda k: _Calls(k, True)}

def injections(kind, act, reset, step=1, first=1):
    "Call `act` again and again with an exception at another place; yields after each failure, until it passes"
    k = first
    while True:
        reset()
        mode = MODES[kind](k)
        try:
            with mode: act()
        except Stop: yield k
        else:
            if mode.n < k: return
        k += step
