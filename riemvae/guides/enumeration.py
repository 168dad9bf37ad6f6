"""Discrete nuisance latents summed out exactly: ``log p(x, z) = log Σ_c p(x, c, z)``, per datum."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.runtime import _ENUM_ALLOCATOR
from torch import Tensor

from riemvae._checks import argument_error


def is_marked(site: Mapping[str, Any]) -> bool:
    """Whether a latent site asks to be summed out, by ``infer={"enumerate": "parallel"}``.

    Example:
        >>> is_marked({"is_observed": False, "infer": {"enumerate": "parallel"}})
        True
    """
    return not site["is_observed"] and (site["infer"] or {}).get("enumerate") == "parallel"


def is_enumerated(site: Mapping[str, Any]) -> bool:
    """Whether a site of a trace holds all values of its support, in a dimension of their own."""
    return (site["infer"] or {}).get("_enumerate_dim") is not None


def enumerated(model: Callable[..., Any], first_dim: int) -> Callable[..., Any]:
    """A model whose marked sites take all values of their support, in dims from ``first_dim`` to the left.

    To be replayed, it is wrapped again: what depends on an enumerated value has to be told from outside. An
    enumeration around it, such as Pyro's ``TraceEnum_ELBO``, goes on undisturbed afterwards.
    """
    inner = poutine.enum(model, first_available_dim=first_dim)

    def run(*args: Any, **kwargs: Any) -> Any:
        state = copy.deepcopy(_ENUM_ALLOCATOR.__dict__)
        try:
            return inner(*args, **kwargs)
        finally:
            _ENUM_ALLOCATOR.__dict__.clear()
            _ENUM_ALLOCATOR.__dict__.update(state)

    return run


def summed_log_prob(
    sites: Iterable[Mapping[str, Any]], kept: frozenset[int], nesting: int, first_dim: int
) -> Tensor:
    """The log probability of sites together, enumerated values summed out, plates but ``kept`` multiplied.

    Values that belong to an inner plate are summed out there, before its product: ``Π_j Σ_c`` and not
    ``Σ_c Π_j``. Sums are taken one latent at a time, that with the smallest intermediate table first, so that
    a chain of ``T`` latents costs ``T`` small tables.

    Args:
        sites: Sites of a trace of a model that was :func:`enumerated`.
        kept: Dims of plates that stay; dims between ``first_dim`` and the plates, of draws, stay too.
        nesting: The depth of the model's plates.
        first_dim: The first dim of enumerated values.

    Returns:
        A tensor in which plates that were multiplied have size 1.

    Raises:
        ValueError: A site with a dimension that is no plate's, or with values that two plates share.

    Source: Obermeyer et al. (2019), tensor variable elimination.
    """
    symbols = _Symbols()
    batch_dims = [dim for dim in range(first_dim + 1, 0) if dim in kept or dim < -nesting]
    batch = frozenset(symbols.of(("batch", dim)) for dim in batch_dims)
    sizes = dict.fromkeys(batch, 1)
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    sums: set[str] = set()
    for site in sites:
        names = {dim: symbols.of(("batch", dim)) for dim in batch_dims}
        plates = set(batch)
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and frame.dim not in kept:
                names[frame.dim] = symbols.of(("plate", frame.name))
                plates.add(names[frame.dim])
        for dim, number in site["infer"].get("_dim_to_id", {}).items():
            names[dim] = symbols.of(("value", number))
            sums.add(names[dim])
        term = _packed(scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"]), names, site)
        sizes.update((name, size) for name, size in zip(term._pyro_dims, term.shape) if name in batch)  # type: ignore[attr-defined]
        tree.setdefault(frozenset(plates), []).append(term)
    try:
        total = contract_to_tensor(tree, sums, target_ordinal=batch, ring=_LogRing(dim_to_size=sizes))
    except NotImplementedError as error:
        raise argument_error("model", "discrete latents whose plates are nested", str(error)) from error
    shape = [1] * -min(batch_dims)
    order = sorted(batch_dims)
    for dim in order:
        shape[dim] = sizes[symbols.of(("batch", dim))]
    positions = [total._pyro_dims.index(symbols.of(("batch", dim))) for dim in order]
    return total.permute(positions).reshape(shape)


class _Symbols:
    """One character for each dimension, as Pyro's packed tensors name theirs."""

    def __init__(self) -> None:
        self._known: dict[Any, str] = {}

    def of(self, key: Any) -> str:
        return self._known.setdefault(key, chr(0x100 + len(self._known)))


def _packed(log_prob: Tensor, names: dict[int, str], site: Mapping[str, Any]) -> Tensor:
    """``log_prob`` without its dimensions of size 1, the others named."""
    dims = [dim for dim in range(-log_prob.dim(), 0) if log_prob.shape[dim] > 1]
    unknown = [dim for dim in dims if dim not in names]
    if unknown:
        raise argument_error(
            "model",
            "log probabilities over plates and enumerated values only",
            f"shape {tuple(log_prob.shape)} at {site['name']!r}, where dim {unknown[0]} is neither",
            "give dimensions that are not plates to the event with .to_event(n)",
        )
    # A view of its own: the names are an attribute of the tensor.
    return _named(
        log_prob.reshape([log_prob.shape[dim] for dim in dims]), "".join(names[dim] for dim in dims)
    )


def _named(tensor: Tensor, dims: str) -> Tensor:
    tensor = tensor[...]
    tensor._pyro_dims = dims  # type: ignore[attr-defined]
    return tensor


class _LogRing(LogRing):  # type: ignore[misc]
    """Sums of products in log space, each sum by ``logsumexp`` of whole terms.

    Pyro's own takes the largest value out of each factor apart: where factors disagree by more than the
    range of ``exp``, as densities of images do, their product underflows.
    """

    def sumproduct(self, terms: list[Any], dims: Iterable[str]) -> Tensor:
        terms, left = list(terms), set(dims)
        while left:
            tables = {dim: _union(t for t in terms if dim in t._pyro_dims) for dim in sorted(left)}
            dim = min(tables, key=lambda d: len(tables[d]))
            factors = [t for t in terms if dim in t._pyro_dims]
            terms = [t for t in terms if dim not in t._pyro_dims]
            joint = _product(factors)
            position = joint._pyro_dims.index(dim)  # type: ignore[attr-defined]
            rest = joint._pyro_dims.replace(dim, "")  # type: ignore[attr-defined]
            terms.append(_named(torch.logsumexp(joint, position), rest))
            left.remove(dim)
        return _product(terms)


def _union(terms: Iterable[Any]) -> str:
    return "".join(sorted(set("".join(term._pyro_dims for term in terms))))


def _product(terms: list[Any]) -> Tensor:
    """The sum of log factors, over all of their dimensions."""
    dims = _union(terms)
    aligned = []
    for term in terms:
        own = sorted(term._pyro_dims)
        sizes = dict(zip(term._pyro_dims, term.shape))
        ordered = term.permute([term._pyro_dims.index(dim) for dim in own])
        aligned.append(ordered.reshape([sizes.get(dim, 1) for dim in dims]))
    return _named(reduce(torch.add, aligned), dims)
