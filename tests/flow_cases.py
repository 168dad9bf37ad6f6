"""Named flows of all families, with weights far from the identity."""

from __future__ import annotations

import torch

from riemvae.flows import IAF, MAF, NSF, InvertedFlow, PlanarFlow, RadialFlow, RealNVP, SplineCoupling

SMALL = {"hidden": (8,), "transforms": 3}

FLOWS = {
    "maf": lambda d, c=0: MAF(d, c, **SMALL),
    "iaf": lambda d, c=0: IAF(d, c, **SMALL),
    "nsf": lambda d, c=0: NSF(d, c, bins=5, bound=4.0, **SMALL),
    "inverted nsf": lambda d, c=0: InvertedFlow(NSF(d, c, bins=5, bound=4.0, **SMALL)),
    "realnvp": lambda d, c=0: RealNVP(d, c, **SMALL),
    "spline coupling": lambda d, c=0: SplineCoupling(d, c, bins=5, bound=4.0, **SMALL),
    "planar": lambda d, c=0: PlanarFlow(d, c, hidden=(8,), transforms=4),
    "radial": lambda d, c=0: RadialFlow(d, c, hidden=(8,), transforms=4),
}


def roughen(module, scale=0.4, seed=0):
    """Weights that no constructor would give: the flow is then far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter))
    return module


def make_flow(name, d, context=0, scale=0.4, seed=0):
    """A flow of the table in double precision, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return roughen(FLOWS[name](d, context).double(), scale, seed)
