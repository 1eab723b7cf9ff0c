"""diffusers' own step loops over a nonlinear fake network, and ours beside them."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdit import sampling

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

EULER, UNIPC, DPM = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"
COG_DDIM, COG_DPM = "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"
SHAPE = (2, 3, 5)
A = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32) / 4


def network(xp, matrix):
    # cos(t / 10): a timestep that is off by one shows. Flat far out, where zero terminal SNR can take x: a wave there
    # would tell the rounding of one float32 loop from the other's
    return lambda x, t: xp.tanh(x @ matrix + xp.cos(t / 10)) - 0.6 * x / (1 + x * x) + 0.2 * x


@pytest.fixture(autouse=True)
def exact_roots(monkeypatch):
    """torch's vectorised float32 square root is off by an ulp in a fifth of the cases, machine by machine; schedules
    that end in pure noise blow that up to 1e-3. Rounded correctly, the reference is one."""
    root = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda s: root(s.double()).to(s.dtype))
    power = torch.Tensor.__pow__
    monkeypatch.setattr(torch.Tensor, "__pow__", lambda s, n: s.sqrt() if n == 0.5 else power(s, n))


class Wide:
    """torch, with float64 where the schedulers write float32: they cast the sample down in some steps."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def instance(config):
    """The scheduler of a config, its solver_p too."""
    kwargs = {k: v for k, v in config.items() if k != "_class_name"}
    if kwargs.get("solver_p") is not None:
        kwargs["solver_p"] = instance(kwargs["solver_p"])
    return getattr(diffusers, config["_class_name"])(**kwargs)


def widen(scheduler):
    for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())


def reference(config, steps, x, *, mu=None, sigmas=None, begin=0, noises=None, clean_end=False, dtype=torch.float32):
    """diffusers' loop.

    noises: what a stochastic scheduler draws, one a step. clean_end: take the last x0 prediction itself, for settings
    whose last step upstream is 0 times infinity.
    """
    torch.set_default_dtype(dtype)
    try:
        scheduler = instance(config)
        scheduler.set_timesteps(steps, **{k: v for k, v in {"mu": mu, "sigmas": sigmas}.items() if v is not None})
        # without it the scheduler searches its own timesteps, and starts a step late where the first one is repeated
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        sample, model = torch.tensor(x, dtype=dtype), network(torch, torch.tensor(A, dtype=dtype))
        solvers = [s for s in (scheduler, getattr(scheduler, "solver_p", None)) if s is not None]
        with pytest.MonkeyPatch.context() as patch:
            at = [0]
            for solver in solvers:
                module = sys.modules[type(solver).__module__]
                if dtype == torch.float64:
                    widen(solver)
                    patch.setattr(module, "torch", Wide())
                if noises is not None and hasattr(module, "randn_tensor"):
                    draw = lambda *a, **k: torch.tensor(noises[at[0]], dtype=dtype)
                    patch.setattr(module, "randn_tensor", draw)
            timesteps, old = scheduler.timesteps[begin:], None
            for i, t in enumerate(timesteps):
                at[0], out = i, model(sample, t.to(dtype))
                if config["_class_name"] == COG_DPM:
                    back = timesteps[i - 1] if i else None
                    sample, old = scheduler.step(out, old, t, back, sample, return_dict=False)
                elif clean_end and i == len(timesteps) - 1:
                    scheduler._step_index = begin + i
                    sample = scheduler.convert_model_output(out, sample=sample)
                else:
                    sample = scheduler.step(out, t, sample, return_dict=False)[0]
        return sample.numpy(), scheduler
    finally:
        torch.set_default_dtype(torch.float32)


def noise(seed=1, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(b).all()
    return np.linalg.norm(a - b) / np.linalg.norm(b)


_step = jax.jit(sampling.step)


def run(table, x, noises=None, wide=False):
    """Our steps, one after another: compiled once for all tables of a structure, with the noise that is given and the
    reference's network, whose own rounding then is the same in both."""
    dtype = torch.float64 if wide else torch.float32
    model = network(torch, torch.tensor(A, dtype=dtype))
    with jax.enable_x64(wide):
        state = sampling.init(jnp.asarray(x, np.float64 if wide else np.float32), table)
        for i in range(table.steps):
            out = model(torch.tensor(np.asarray(state.x)), torch.tensor(table.timestep[i], dtype=dtype))
            z = noises[i] if noises is not None and table.stochastic else None
            state = _step(state, sampling.row(table, i), out.numpy(), z)
        return np.asarray(state.x)


def same_timesteps(table, scheduler, begin=0):
    np.testing.assert_array_equal(table.timestep, scheduler.timesteps[begin:].numpy().astype(np.float32))
