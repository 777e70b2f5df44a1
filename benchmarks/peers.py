"""The other libraries' sides: each over the same arrays, or equal copies, with the gradients already there."""

from collections.abc import Callable
from typing import Any

import torch

import optimisers.torch
from measuring import Step
from ours import DECAY, ETA, adamw
from problems import Shapes, arrays

Tensors = dict[str, torch.Tensor]


def tensors(shapes: Shapes, seed: int) -> Tensors:
    # Copies, so that they lie as torch lays them.
    return {name: torch.from_numpy(x).clone() for name, x in arrays(shapes, seed).items()}


def copied(tree: Tensors) -> Tensors:
    return {name: x.clone() for name, x in tree.items()}


def parameters(model: Tensors, grads: Tensors) -> list[torch.nn.Parameter]:
    """The same memory as parameters, with their gradients."""
    result = []
    for name, x in model.items():
        parameter = torch.nn.Parameter(x)
        parameter.grad = grads[name]
        result.append(parameter)
    return result


def by_torch(make: Callable[..., torch.optim.Optimizer], model: Tensors, grads: Tensors, **options: Any) -> Step:
    """The step of an optimizer with the interface of torch.optim."""
    return make(parameters(model, grads), **options).step


def by_scheduler(optimizer: torch.optim.Optimizer) -> Step:
    """The step of an optimizer and that of a scheduler, which gives another learning rate each time."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1))

    def step():
        optimizer.step()
        scheduler.step()

    return step


def torch_scheduled(model: Tensors, grads: Tensors) -> Step:
    return by_scheduler(torch.optim.AdamW(parameters(model, grads), lr=ETA, weight_decay=DECAY, fused=True))


def adapter_scheduled(model: Tensors, grads: Tensors) -> Step:
    """This library behind the interface of torch.optim."""
    return by_scheduler(optimisers.torch.Optimizer(adamw(), parameters(model, grads)))


def torch_adamw(model: Tensors, grads: Tensors, **how: bool) -> Step:
    return by_torch(torch.optim.AdamW, model, grads, lr=ETA, weight_decay=DECAY, **how)


def torch_clipped(model: Tensors, grads: Tensors) -> Step:
    """``clip_grad_norm_``, then the fused step. The clipping writes to its gradients, so they are its own."""
    own = parameters(model, copied(grads))
    optimizer = torch.optim.AdamW(own, lr=ETA, weight_decay=DECAY, fused=True)

    def step():
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()

    return step


def by_optax(transformation: Any, model: Tensors, grads: Tensors) -> Step:
    """Under jit, with parameters and state donated; what a step returns is given to the next."""
    import jax
    import optax

    params, given = ({name: jax.numpy.array(x.numpy(), copy=True) for name, x in tree.items()} for tree in (model, grads))
    state = jax.jit(transformation.init)(params)

    def one(params, state, given):
        updates, state = transformation.update(given, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(one, donate_argnums=(0, 1))

    def step():
        nonlocal params, state
        params, state = jax.block_until_ready(jitted(params, state, given))

    return step


def optax_adamw() -> Any:
    import optax

    return optax.adamw(ETA, weight_decay=DECAY)


def optax_chain() -> Any:
    """The chain of `ours.chain`."""
    import jax
    import optax

    def sign_decay(updates, params):
        return jax.tree.map(lambda dx, x: dx + 1e-4 * jax.numpy.sign(x), updates, params)

    return optax.chain(optax.clip(1.0), optax.stateless(sign_decay), optax.add_decayed_weights(1e-4), optax_adamw())


def torchopt_adamw(model: Tensors, grads: Tensors) -> Step:
    """Its functional form, out of place."""
    import torchopt

    rule = torchopt.adamw(lr=ETA, weight_decay=DECAY)
    params = dict(model)
    state = rule.init(params)

    def step():
        nonlocal params, state
        updates, state = rule.update(grads, state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)

    return step


def by_pytorch_optimizer(name: str, model: Tensors, grads: Tensors, **options: Any) -> Step:
    import pytorch_optimizer

    return by_torch(getattr(pytorch_optimizer, name), model, grads, **options)


def heavyball_adamw(model: Tensors, grads: Tensors) -> Step:
    """HeavyBall compiles its step. It takes the gradients away, so each step hands it the same ones again."""
    import heavyball

    given = copied(grads)
    own = parameters(model, given)
    optimizer = heavyball.AdamW(own, lr=ETA, betas=(0.9, 0.999), weight_decay=DECAY)

    def step():
        for parameter, grad in zip(own, given.values(), strict=True):
            parameter.grad = grad
        optimizer.step()

    return step
