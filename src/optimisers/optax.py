"""Coming from optax: ``import optimisers.optax``. It needs neither optax nor JAX."""

from .interop.optax_state import from_optax

__all__ = ["from_optax"]
