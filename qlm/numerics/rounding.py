"""Learned rounding: where each weight lies between the levels of its grid, so that a gradient can move it to the next one.

    code = clamp(round(base + offset), 0, 2^bits - 1)          w ~ scale (code - zero_point)

`base` is the weight in steps of its grid and stays; `offset`, at most half a step either way, is learned with the gradient of the
dequantized weight as its own (straight through the rounding). Signed gradient descent on offsets is SignRound's (Cheng et al. 2023,
arXiv:2309.05516), the method of AutoRound. Three things differ. It starts from any codes, GPTQ's among them, and not from the nearest
ones. Signs are those of a running mean of the gradients: with the sign of every small batch by itself most weights walk at random, and
what GPTQ has made of their errors together is lost. And the step shrinks with the square of what is left to do.

Shapes: O out features, I in features, G groups; `g_idx` int [I] is the group of each in feature, in any order.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# How far an offset may go. Less than half a step: a weight that lies on a level stays there, and with it a group of zeros, whose
# scale means nothing.
REACH = 0.5 - 2.0**-10
# How far inside the cell of its code a weight starts that lies in another one: it is moved there by no more than is needed.
INSIDE = 0.5 - 2.0**-7
MOMENTUM = 0.9
# The first step, in units of 1 / steps. With the quadratic decay all steps together make half a grid step: 1.5 / 3.
RATE = 1.5


@dataclass(frozen=True)
class Rounded:
    """A linear's weights on affine grids.

    Attributes:
        codes: uint8 [O, I]. scale: fp32 [O, G]. zero_point: int [O, G]. g_idx: int [I].
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    g_idx: Tensor
    bits: int


class Offsets:
    """What is learned for one linear, and what it starts from.

    Attributes:
        base: fp32 [O, I], the weight itself in steps of its grid where its code is one of the two nearest, else the nearest place from
            which the code can be reached: GPTQ moves weights by several steps to repair others' errors.
        offset: fp32 [O, I], |offset| <= REACH; at first such that the codes are exactly those given.
    """

    def __init__(self, weight: Tensor, rounded: Rounded) -> None:
        """weight [O, I], any float dtype."""
        group, code = rounded.g_idx.long(), rounded.codes.float()
        self.bits = rounded.bits
        self.scale = rounded.scale.float()[:, group]
        self.zero_point = rounded.zero_point.float()[:, group]
        base = (weight.float() / self.scale).add_(self.zero_point).clamp_(0, 2**self.bits - 1)
        far = INSIDE + REACH
        self.base = torch.minimum(torch.maximum(base, code - far), code + far)
        start = torch.minimum(torch.maximum(self.base, code - INSIDE), code + INSIDE)
        self.offset = (start - self.base).clamp_(-REACH, REACH).requires_grad_()
        self.mean_gradient = torch.zeros_like(base)

    def codes(self) -> Tensor:
        """uint8 [O, I]."""
        return _codes(self.base, self.offset.detach(), self.bits).to(torch.uint8)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight [O, I], through which gradients reach the offset."""
        found: Tensor = _StraightThrough.apply(self.offset, self.base, self.scale, self.zero_point, self.bits, dtype)
        return found

    @torch.no_grad()
    def step(self, index: int, steps: int) -> None:
        """Step `index` of `steps`, from 0 on, by the gradient that a backward pass has left in `offset`, which is taken away."""
        assert self.offset.grad is not None
        self.mean_gradient.mul_(MOMENTUM).add_(self.offset.grad)
        self.offset.grad = None
        rate = RATE / steps * (1 - index / steps) ** 2
        self.offset.sub_(self.mean_gradient.sign(), alpha=rate).clamp_(-REACH, REACH)


def _codes(base: Tensor, offset: Tensor, bits: int) -> Tensor:
    return (base + offset).round_().clamp_(0, 2**bits - 1)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, offset: Tensor, base: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(scale)
        return _codes(base, offset, bits).sub_(zero_point).mul_(scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (scale,) = ctx.saved_tensors
        # Not stopped at the ends of the grid: an offset pushed beyond them is held by its reach, and must find its way back.
        return gradients[0] * scale, None, None, None, None, None
