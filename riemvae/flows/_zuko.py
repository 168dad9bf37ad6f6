"""zuko, imported so that the checks of torch's and Pyro's distributions stay as they were.

Importing zuko sets ``torch.distributions.Distribution._validate_args = False`` for the whole process. It also
gives that class empty ``arg_constraints``, which its own distributions need where arguments are validated:
that stays. All other files of riemvae take zuko's names from here.
"""

from __future__ import annotations

from torch.distributions import Distribution

_validated = Distribution._validate_args

from zuko.flows import (  # noqa: E402
    Flow,
    GeneralCouplingTransform,
    LazyDistribution,
    LazyInverse,
    LazyTransform,
    MaskedAutoregressiveTransform,
)
from zuko.transforms import (  # noqa: E402
    AutoregressiveTransform,
    ComposedTransform,
    MonotonicAffineTransform,
    MonotonicRQSTransform,
)
from zuko.utils import unpack  # noqa: E402

Distribution._validate_args = _validated

__all__ = [
    "AutoregressiveTransform",
    "ComposedTransform",
    "Flow",
    "GeneralCouplingTransform",
    "LazyDistribution",
    "LazyInverse",
    "LazyTransform",
    "MaskedAutoregressiveTransform",
    "MonotonicAffineTransform",
    "MonotonicRQSTransform",
    "unpack",
]
