"""A process of its own for each test, forked from a server that has imported the large libraries once.

Importing torch, diffusers and transformers costs ten seconds of processor time; a hundred notebooks would pay for it a hundred times.
"""
import multiprocessing, os, sys

PRELOAD = ["torch", "peft", "nbdev.test", "pytest", "matplotlib.figure", "transformers.models.clip.modeling_clip",
           "transformers.models.t5.modeling_t5",
           "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "diffusers.models.unets.unet_2d_condition",
           "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3", "diffusers.training_utils", "diffusers.optimization"]


def notebook(path):
    "Run the cells of a notebook, as `nbdev-test` does."
    from nbdev.test import nbdev_test
    nbdev_test(path, n_workers=0)


def tests(path):
    "Run a file of tests."
    import pytest
    sys.dont_write_bytecode = True
    sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", path]))


def _in_child(job, path, log):
    "What the forked process does: its output goes to a file."
    fd = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(fd, 1); os.dup2(fd, 2)
    job(path)


def server():
    "The context of processes that are forked from a server; it starts with the first of them, with this process's environment."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run(context, job, path, log, timeout):
    "Run `job(path)` in a forked process; AssertionError with the end of its output if it fails or takes too long."
    p = context.Process(target=_in_child, args=(job, str(path), str(log)))
    p.start(); p.join(timeout)
    slow = p.is_alive()
    if slow: p.kill(); p.join()
    text = log.read_text(errors="replace") if log.exists() else ""
    assert not slow, f"{path} was stopped after {timeout} s\n{text[-2000:]}"
    assert p.exitcode == 0, "\n".join(text.splitlines()[-60:]) or f"{path} ended with exit code {p.exitcode}"
