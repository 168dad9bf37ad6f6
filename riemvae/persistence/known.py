"""The classes outside riemvae that a file may name, and how their arguments are read from an instance."""

from __future__ import annotations

import inspect
from typing import Any

import geoopt
import pyro.distributions
import torch
from torch import nn
from torch.distributions import Distribution, constraints

CONTAINERS: dict[str, type[nn.Module]] = {
    cls.__name__: cls for cls in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
}

LAYERS: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        nn.Identity, nn.Linear, nn.Bilinear, nn.Embedding, nn.Flatten, nn.Unflatten,
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
        nn.Softsign, nn.GLU, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softmax, nn.LogSoftmax,
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
        nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.GroupNorm,
        nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
        nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
        nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
        nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.ZeroPad2d,
        geoopt.Sphere, geoopt.Lorentz, geoopt.PoincareBall,
    )
}  # fmt: skip

# geoopt's manifolds of a curvature, which is a parameter whether it is trained or not.
_CURVATURES: dict[type[nn.Module], str] = {geoopt.Lorentz: "k", geoopt.PoincareBall: "c"}

# The arguments that define each distribution; an instance has attributes of these names, but for one.
_DISTRIBUTION_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "Normal": ("loc", "scale"),
    "LogNormal": ("loc", "scale"),
    "MultivariateNormal": ("loc", "scale_tril"),
    "LowRankMultivariateNormal": ("loc", "cov_factor", "cov_diag"),
    "StudentT": ("df", "loc", "scale"),
    "Laplace": ("loc", "scale"),
    "Cauchy": ("loc", "scale"),
    "Gumbel": ("loc", "scale"),
    "HalfNormal": ("scale",),
    "HalfCauchy": ("scale",),
    "Exponential": ("rate",),
    "Gamma": ("concentration", "rate"),
    "InverseGamma": ("concentration", "rate"),
    "Beta": ("concentration1", "concentration0"),
    "Dirichlet": ("concentration",),
    "Uniform": ("low", "high"),
    "VonMises": ("loc", "concentration"),
    "Poisson": ("rate",),
    "Bernoulli": (),
    "Categorical": (),
    "OneHotCategorical": (),
    "Delta": ("v", "log_density", "event_dim"),
    "Independent": ("base_distribution", "reinterpreted_batch_ndims"),
    "MixtureSameFamily": ("mixture_distribution", "component_distribution"),
}

DISTRIBUTIONS: dict[str, type[Distribution]] = {
    f"{room}.{name}": getattr(module, name)
    for room, module in (("torch", torch.distributions), ("pyro", pyro.distributions))
    for name in _DISTRIBUTION_ARGUMENTS
    if hasattr(module, name)
}
_DISTRIBUTION_NAMES = {cls: name for name, cls in reversed(DISTRIBUTIONS.items())}

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16,
        torch.int32, torch.int64, torch.bool, torch.complex64,
    )
}  # fmt: skip

CONSTRAINTS: dict[str, constraints.Constraint] = {
    "real": constraints.real,
    "positive": constraints.positive,
    "nonnegative": constraints.nonnegative,
    "unit_interval": constraints.unit_interval,
    "simplex": constraints.simplex,
    "lower_cholesky": constraints.lower_cholesky,
    "corr_cholesky": constraints.corr_cholesky,
    "positive_definite": constraints.positive_definite,
    "real_vector": constraints.real_vector,
    "softplus_positive": pyro.distributions.constraints.softplus_positive,
    "softplus_lower_cholesky": pyro.distributions.constraints.softplus_lower_cholesky,
    "ordered_vector": pyro.distributions.constraints.ordered_vector,
}


def layer_name(module: nn.Module) -> str | None:
    """The name of a plain torch layer, container or geoopt manifold; None for others and with hooks."""
    name = type(module).__name__
    known = LAYERS.get(name) is type(module) or CONTAINERS.get(name) is type(module)
    # A hook is code: weight normalisation of the old kind is one. A sphere within a subspace keeps its
    # projector and not the arguments that it was built from.
    custom = bool(module._forward_hooks or module._forward_pre_hooks)
    custom = custom or getattr(module, "projector", None) is not None
    return name if known and not custom else None


def layer_arguments(module: nn.Module) -> dict[str, Any]:
    """The constructor arguments of a layer or manifold, read from its attributes of the same names."""
    if isinstance(module, geoopt.Manifold):
        curvature = _CURVATURES.get(type(module))
        if curvature is None:
            return {}
        learnable = any(parameter.requires_grad for parameter in module.parameters())
        return {curvature: float(getattr(module, curvature).detach()), "learnable": learnable}
    skipped = ("self", "args", "kwargs", "device", "dtype")
    names = [
        n for n in inspect.signature(type(module).__init__).parameters if n not in skipped and n[0] != "_"
    ]
    arguments = {name: getattr(module, name) for name in names if name != "bias"}
    if "bias" in names:
        arguments["bias"] = module.bias is not None
    return arguments


def distribution_name(distribution: Distribution) -> str | None:
    """The name of a known distribution; None for any other class."""
    return _DISTRIBUTION_NAMES.get(type(distribution))


def distribution_arguments(distribution: Any) -> dict[str, Any]:
    """The constructor arguments of a known distribution as they are now."""
    name = _DISTRIBUTION_NAMES[type(distribution)].split(".")[1]
    attributes = {argument: argument for argument in _DISTRIBUTION_ARGUMENTS[name]}
    if name == "Independent":
        attributes["base_distribution"] = "base_dist"
    arguments = {argument: getattr(distribution, attribute) for argument, attribute in attributes.items()}
    if (
        not arguments
    ):  # probs or logits, whichever it was built from; the other is derived when it is asked for
        holder = getattr(distribution, "_categorical", distribution)
        kind = "logits" if holder._param is vars(holder).get("logits") else "probs"
        arguments[kind] = holder._param
    arguments["validate_args"] = vars(distribution).get("_validate_args")
    return arguments


def constraint_node(constraint: constraints.Constraint) -> Any:
    """A constraint as JSON; None for one that is not known."""
    if isinstance(constraint, constraints.independent):
        base = constraint_node(constraint.base_constraint)
        return None if base is None else [base, constraint.reinterpreted_batch_ndims]
    for name, known in CONSTRAINTS.items():
        # Not by identity: a copy of a parameter store has copies of the constraints. Bounds may be tensors.
        if type(constraint) is type(known) and _settings(constraint) == _settings(known):
            return name
    return None


def _settings(constraint: constraints.Constraint) -> str:
    return repr(sorted(vars(constraint).items()))


def constraint_of(node: Any) -> constraints.Constraint:
    """The constraint that :func:`constraint_node` described."""
    if isinstance(node, list):
        base, ndims = node
        return constraints.independent(constraint_of(base), ndims)
    return CONSTRAINTS[node]
