"""NF4 codes and absmax values chosen for what a layer does to its inputs, in the bytes that bitsandbytes reads.

`numerics/nf4.py` takes the largest magnitude of a block of 64 weights for its absmax and the nearest level for each weight. The file
format asks for neither: a weight is `codebook[code] * absmax` with any code and any absmax, a negative one too, which mirrors the
codebook (its 8 levels above zero then serve weights below it). Three steps, each optional, use that freedom to lower
tr(E H E^T), E = W - Q, H the damped Hessian of the inputs (gptq.py has the notation):

- search: absmax is the best of some fractions, of both signs, of the largest magnitude, instead of that magnitude;
- compensate: columns are rounded one by one and later columns repair the error, as in GPTQ (Frantar et al., ICLR 2023), with the
  nearest level in place of the integer grid. A block's absmax is chosen when its first column's turn comes, and the search then
  really rounds the block with its best candidates, repairs included, and keeps the one that loses least;
- sweeps: coordinate descent on the codes under H (QuantEase, Behdin et al. 2023, arXiv:2309.01885), and after each block the
  absmax that fits its codes best, if that lowers the loss.

With double quantization every absmax that is tried is one that a nested 8-bit code can stand for, since codes chosen for another one
would no longer be the best. The nested scales are therefore fixed first, from the largest magnitudes.

No row comes out worse under H than `quantize_nf4` makes it. No files, no models, no gathering of Hessians here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlm.numerics.affine import RowError
from qlm.numerics.gptq import Factor
from qlm.numerics.nf4 import (
    BLOCK,
    NESTED_BLOCK,
    codebook,
    double_dequantize,
    double_quantize,
    dynamic_map,
    quantize_nf4,
)

# Of the largest magnitude; tried with both signs. On the demo's layers half the step lowers the loss by 1 %, a wider range by nothing.
FRACTIONS = tuple(round(0.7 + 0.025 * i, 3) for i in range(17))
# How many of them, the best by the block's own weighted error, are tried with repairs. Half as many raise the loss by 1 %.
TRIALS = 16
# bitsandbytes' guard, as in nf4.py: blocks of zeros get the same codes.
_SMALLEST_DIVISOR = 1e-38
# Equal bins of [-1, 1] in `_Levels`: at most one threshold lies in each of 64, and none within 0.05 bins of an edge.
_BINS = 64


@dataclass(frozen=True)
class Nf4Result:
    """What the file holds, and how far it is from the weight.

    Attributes:
        codes: uint8 [O * I], as `pack_nf4` takes them.
        absmax: fp32 [O * I / 64], may be negative; with double quantization exactly what `nested` decodes to.
        nested: with double quantization what `double_dequantize` takes: uint8 [O * I / 64], fp32 [ceil(O * I / 64 / 256)], fp32 scalar.
        error: sqrt(tr(E H E^T)) under the factor's damped Hessian; under the unit Hessian without one.
    """

    codes: Tensor
    absmax: Tensor
    nested: tuple[Tensor, Tensor, Tensor] | None
    error: float


def quantize_nf4_under(
    weight: Tensor,
    hessian: Tensor | None = None,
    factor: Factor | None = None,
    *,
    search: bool,
    compensate: bool = False,
    sweeps: int = 0,
    double_quant: bool = False,
) -> Nf4Result:
    """NF4 of little tr(E H E^T). With `search`, `compensate` and `sweeps` off it gives the bytes of `quantize_nf4`.

    Args:
        weight: [O, I], any float dtype; I is a multiple of 64.
        hessian: fp32 [I, I], E[x x^T], with its factor; None for both is the unit Hessian, under which there is nothing to repair.
        factor: `factorize(hessian, pivot_order(hessian, damp), damp)`, or in any order that keeps blocks of 64 together.
        search: choose absmax; weights count by H_jj, or by 1 / U_jj^2 where later columns repair their error.
        compensate: let later columns repair the error of earlier ones.
        sweeps: of coordinate descent over all codes.
        double_quant: absmax is stored in nested 8-bit codes.

    Raises:
        ValueError: sizes that do not fit, NaN or infinite weights, an order that mixes blocks, or values too large for fp32.
    """
    _check(weight, hessian, factor, needs_hessian=compensate or sweeps > 0)
    O, I = weight.shape
    order = torch.arange(I, device=weight.device) if factor is None else factor.order
    codes, absmax = quantize_nf4(weight)
    nested = double_quantize(absmax) if double_quant else None
    nests: list[_Nest | None] = [None]
    if nested is not None:
        nests = [_Nest.around_zero(absmax), _Nest.of(*nested[1:])]
        absmax = double_dequantize(*nested)
    # The file's number of each block, blocks in the order of the factor: [I / 64, O].
    blocks = torch.arange(O, device=weight.device) * (I // BLOCK) + (order[::BLOCK, None] // BLOCK)
    plain = _Rounded(codes.view(O, I).T[order].contiguous(), absmax[blocks])
    layer = _Layer(
        # Transposed, so that a column of the paper is contiguous here.
        W=weight.float().T[order].contiguous(),
        H=None if hessian is None or factor is None else _damped(hessian, factor),
        U=factor.U if factor is not None and compensate else None,
        blocks=blocks,
        levels=_Levels.on(weight.device),
    )
    plain_lost = layer.lost(plain)
    if not (search or compensate or sweeps):
        return Nf4Result(codes, absmax, nested, plain_lost.sum().sqrt().item())

    for nest in nests:
        found = _round(layer, nest, search)
        for _ in range(sweeps):
            _sweep_(layer, nest, found)
        lost = layer.lost(found)
        if not bool(lost.isfinite().all()):
            raise RowError(
                "the rounded weights are NaN or infinite: the weights or the Hessian are too large for fp32",
                int(lost.isfinite().logical_not().nonzero()[0]),
            )
        # Rows that are worse get their plain codes, whose absmax only the last nest can store.
        better = lost <= plain_lost
        if bool(better.all()):
            break
    error = torch.where(better, lost, plain_lost).sum().sqrt().item()
    by_input = torch.empty_like(found.codes)
    by_input[order] = torch.where(better, found.codes, plain.codes)
    absmax[blocks] = torch.where(better, found.absmax, plain.absmax)
    if nest is not None:
        nested = (nest.nearest(absmax, torch.arange(len(absmax), device=absmax.device)), nest.absmax, nest.offset)
        absmax = double_dequantize(*nested)
    return Nf4Result(by_input.T.reshape(-1), absmax, nested, error)


def pivot_order(hessian: Tensor, damp: float, block: int = BLOCK) -> Tensor:
    """An order of columns in which GPTQ loses little, blocks kept together: int64 [I].

    The loss is the sum of squared rounding errors, each times 1 / U_jj^2: the part of H_jj that the columns after j cannot repair. The
    product of these is det H in any order, so that their sum is least where they are most alike. The order is made from its end:
    among the blocks left, the one whose columns have the least sum of H_jj after the columns already placed have repaired what they
    can, and inside it one column after the other, the least first. (The least pivot first is the rule of "The geometry of LLM
    quantization: GPTQ as Babai's nearest plane algorithm", Chen et al. 2025, arXiv:2507.18553; the blocks are added here.)

    Args:
        hessian: fp32 [I, I]. damp: as for `factorize`.
    """
    I = len(hessian)
    left = torch.arange(I, device=hessian.device).view(-1, block)
    # What the columns placed so far cannot repair of the others: a Schur complement, which shrinks by a block each time.
    S = hessian.clone()
    S.diagonal().add_(damp * hessian.diagonal().mean())
    order = torch.empty_like(left)
    for place in reversed(range(len(left))):
        n = place * block
        chosen = int(S.diagonal().view(-1, block).sum(1).argmin())
        first, last = slice(chosen * block, (chosen + 1) * block), slice(n, n + block)
        # Swap the chosen block with the last one.
        if chosen < place:
            for swapped in (S, S.T):
                swapped[first], swapped[last] = swapped[last].clone(), swapped[first].clone()
            left[chosen], left[place] = left[place].clone(), left[chosen].clone()
        order[place] = left[place][_least_pivots(S[last, last]).flip(0)]
        L, _ = torch.linalg.cholesky_ex(S[last, last])
        X = torch.linalg.solve_triangular(L, S[last, :n], upper=False)
        S = S[:n, :n].addmm_(X.T, X, alpha=-1)
    return order.flatten()


def _least_pivots(S: Tensor) -> Tensor:
    """The order of elimination that takes the least diagonal element each time: int64 [g]. Any matrix gives a permutation."""
    S, order = S.clone(), torch.empty(len(S), dtype=torch.int64, device=S.device)
    taken = torch.zeros(len(S), dtype=torch.bool, device=S.device)
    for i in range(len(S)):
        # A matrix that is not positive definite ends in NaN; `factorize` refuses it or damps it more.
        pivots = S.diagonal().nan_to_num(nan=0.0).masked_fill(taken, torch.inf)
        pivot, j = pivots.min(0)
        order[i] = j
        taken[j] = True
        row = S[j].clone()
        S.addr_(row, row / pivot, alpha=-1)
    return order


@dataclass(frozen=True)
class _Levels:
    """The codebook, and tables by which the nearest level is found in a ninth of the time of `torch.bucketize`.

    [-1, 1] is cut into equal bins. Bin b has the codes `codes[2 b]` below and `codes[2 b + 1]` above `thresholds[b]`; the same codes as
    `quantize_nf4` finds, since no threshold is so near to an edge that rounding could put a value in the wrong bin.
    """

    values: Tensor  # fp32 [16]
    thresholds: Tensor  # fp32 [bins]
    codes: Tensor  # int32 [2 bins]

    @staticmethod
    def on(device: torch.device) -> "_Levels":
        values = codebook()
        middles = (values[:-1] + values[1:]) / 2
        low, high = torch.bucketize(torch.linspace(-1, 1, _BINS + 1), middles, out_int32=True).unfold(0, 2, 1).unbind(1)
        thresholds = torch.where(high > low, middles[low.clamp(max=14)], torch.inf)
        codes = torch.stack([low, high], dim=1).flatten()
        return _Levels(values.to(device), thresholds.to(device), codes.to(device))

    def nearest(self, scaled: Tensor) -> Tensor:
        """Code of the level nearest to each value: int32, the shape of `scaled`. NaN gives any code."""
        # Twice clamped: a conversion to integers is defined for what fits them, and NaN does not.
        bins = scaled.clamp(-1, 1).mul_(_BINS / 2).add_(_BINS / 2).to(torch.int32).clamp_(0, _BINS - 1)
        above = scaled > self.thresholds.index_select(0, bins.view(-1)).view_as(scaled)
        return self.codes.index_select(0, bins.mul_(2).add_(above).view(-1)).view_as(bins)

    def __getitem__(self, codes: Tensor) -> Tensor:
        return self.values.index_select(0, codes.reshape(-1).int()).view(codes.shape)


@dataclass(frozen=True)
class _Nest:
    """The absmax values that nested codes can stand for: levels[code] * absmax of 256 of them + offset.

    Attributes:
        absmax: fp32 [ceil(N / 256)]. offset: fp32 scalar. levels: fp32 [256], the dynamic map.
    """

    absmax: Tensor
    offset: Tensor
    levels: Tensor

    @staticmethod
    def of(absmax: Tensor, offset: Tensor) -> "_Nest":
        return _Nest(absmax, offset, dynamic_map().to(absmax.device))

    @staticmethod
    def around_zero(absmax: Tensor) -> "_Nest":
        """For values of both signs, as large as the largest of each 256 `absmax`. bitsandbytes takes their mean for the offset when it
        writes, which leaves no room for negative ones; when it reads, it adds whatever offset the file has."""
        blocks = torch.nn.functional.pad(absmax, (0, -absmax.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
        return _Nest.of(blocks.amax(1), absmax.new_zeros(()))

    def nearest(self, absmax: Tensor, blocks: Tensor) -> Tensor:
        """Codes: uint8, the shape of `absmax`. blocks: the number of each in the file."""
        # 0 / 0 where all of 256 are zero.
        scaled = ((absmax - self.offset) / self.absmax[blocks // NESTED_BLOCK]).nan_to_num(nan=0.0)
        return torch.bucketize(scaled, (self.levels[:-1] + self.levels[1:]) / 2, out_int32=True).to(torch.uint8)

    def fit(self, absmax: Tensor, blocks: Tensor) -> Tensor:
        """The nearest values that codes can stand for, as `double_dequantize` computes them."""
        return self.levels[self.nearest(absmax, blocks).int()] * self.absmax[blocks // NESTED_BLOCK] + self.offset


@dataclass
class _Rounded:
    """codes uint8 [I, O], absmax fp32 [I / 64, O], both in the order of the factor."""

    codes: Tensor
    absmax: Tensor


@dataclass(frozen=True)
class _Layer:
    """What is to be rounded, in the order of the factor.

    Attributes:
        W: fp32 [I, O]. H: fp32 [I, I], damped; None is the unit Hessian. U: of its factor; None repairs nothing.
        blocks: int64 [I / 64, O], the file's number of each block.
    """

    W: Tensor
    H: Tensor | None
    U: Tensor | None
    blocks: Tensor
    levels: _Levels

    def error(self, rounded: _Rounded) -> Tensor:
        """E = W - Q: fp32 [I, O]."""
        levels = self.levels[rounded.codes].view(len(self.blocks), BLOCK, -1)
        return self.W - levels.mul_(rounded.absmax[:, None]).view_as(self.W)

    def lost(self, rounded: _Rounded) -> Tensor:
        """E H E^T of each row: float64 [O]."""
        E = self.error(rounded)
        if self.H is None:
            return torch.linalg.vector_norm(E, dim=0, dtype=torch.float64).square()
        # Clamped: that of a row which is all but exact may round to less than nothing.
        return E.mul_(self.H @ E).sum(0, dtype=torch.float64).clamp_(min=0)


def _fit(absmax: Tensor, nest: _Nest | None, blocks: Tensor) -> Tensor:
    return absmax if nest is None else nest.fit(absmax, blocks)


def _inverse(absmax: Tensor) -> Tensor:
    """1 / absmax as nf4.py computes it, for both signs."""
    tiny = torch.full_like(absmax, _SMALLEST_DIVISOR).copysign_(absmax)
    return 1.0 / torch.where(absmax.abs() < _SMALLEST_DIVISOR, tiny, absmax)


def _round(layer: _Layer, nest: _Nest | None, search: bool) -> _Rounded:
    """Codes and absmax block after block, repaired where the layer has U."""
    W, H, U, levels = layer.W, layer.H, layer.U, layer.levels
    if U is not None:
        W = W.clone()
        # 1 / U_jj^2, relative to the largest: a Hessian of very large or small inputs would overflow.
        importance = (U.diagonal().amin() / U.diagonal()).square()
    else:
        importance = torch.ones_like(W[:, 0]) if H is None else H.diagonal() / H.diagonal().amax()
    fractions = torch.tensor((*FRACTIONS, *(-f for f in FRACTIONS)) if search else (1.0,), device=W.device)
    rounded = _Rounded(torch.empty_like(W, dtype=torch.uint8), torch.empty_like(layer.blocks, dtype=torch.float32))
    for place, blocks in enumerate(layer.blocks):
        s = slice(place * BLOCK, (place + 1) * BLOCK)
        tried = _fit(fractions[:, None] * W[s].abs().amax(0), nest, blocks)
        tried = _best(W[s], importance[s], tried, 1 if U is None else TRIALS, levels)
        if U is None:
            rounded.absmax[place] = tried[0]
            rounded.codes[s] = levels.nearest(W[s] * _inverse(tried[0]))
        else:
            rounded.codes[s], rounded.absmax[place], E = _repair(W[s], U[s, s], tried, levels)
            W[s.stop :].addmm_(U[s, s.stop :].T, E, alpha=-1)
    return rounded


def _best(weight: Tensor, importance: Tensor, absmax: Tensor, count: int, levels: _Levels) -> Tensor:
    """The `count` absmax of least sum_j importance_j (w_j - q_j)^2, best first: [count, O]. weight [g, O], absmax [C, O]."""
    if len(absmax) <= count:
        return absmax
    errors = torch.stack(
        [importance @ levels[levels.nearest(weight * _inverse(a))].mul_(a).sub_(weight).square_() for a in absmax]
    )
    return absmax.gather(0, errors.topk(count, dim=0, largest=False).indices)


def _repair(weight: Tensor, U: Tensor, absmax: Tensor, levels: _Levels) -> tuple[Tensor, Tensor, Tensor]:
    """Round a block as GPTQ does, with each of the absmax [C, O], and keep the one that loses least. weight [g, O], U [g, g].

    Returns:
        codes uint8 [g, O]; absmax fp32 [O]; E fp32 [g, O], e_j = (w_j - q_j) / U_jj, whose squares sum up to the loss.
    """
    g, O = weight.shape
    C = len(absmax)
    W = weight[:, None].repeat(1, C, 1)
    E, codes = torch.empty_like(W), torch.empty_like(W, dtype=torch.uint8)
    inverse = _inverse(absmax)
    for j in range(g):
        code = levels.nearest(W[j] * inverse)
        codes[j] = code
        torch.sub(W[j], levels[code].mul_(absmax), out=E[j])
        E[j].div_(U[j, j])
        W[j + 1 :].view(-1, C * O).addr_(U[j, j + 1 :], E[j].view(-1), alpha=-1)
    best = E.square().sum(0).argmin(0)
    chosen = best.expand(g, 1, O)
    return codes.gather(1, chosen)[:, 0], absmax.gather(0, best[None])[0], E.gather(1, chosen)[:, 0]


def _sweep_(layer: _Layer, nest: _Nest | None, rounded: _Rounded) -> None:
    """Give each weight the code that is best while the others stay, and each block the absmax that is best for its codes.

    With R = H E the loss is least at q_j + R_j / H_jj along column j, and along a block of levels d at absmax + d^T R / d^T H d. A
    change of Q by D changes R by -H D.
    """
    H, levels = layer.H, layer.levels
    assert H is not None
    R = H @ layer.error(rounded)
    for place, blocks in enumerate(layer.blocks):
        s = slice(place * BLOCK, (place + 1) * BLOCK)
        codes, absmax, h, r = rounded.codes[s], rounded.absmax[place], H[s, s], R[s]
        before = levels[codes].mul_(absmax)
        q = before.clone()
        inverse = _inverse(absmax)
        for j in range(BLOCK):
            code = levels.nearest((q[j] + r[j] / h[j, j]).mul_(inverse))
            change = levels[code].mul_(absmax).sub_(q[j])
            codes[j] = code
            q[j] += change
            r.addr_(h[j], change, alpha=-1)
        d = levels[codes]
        slope, curvature = (d * r).sum(0), (d * (h @ d)).sum(0)
        fitted = _fit(absmax + slope / curvature, nest, blocks)
        change = fitted - absmax
        # False too for 0 / 0, a block of zeros.
        lower = change * (change * curvature - 2 * slope) < 0
        absmax.copy_(torch.where(lower, fitted, absmax))
        R[s.stop :].addmm_(H[s.stop :, s], d.mul_(absmax).sub_(before), alpha=-1)


def _damped(hessian: Tensor, factor: Factor) -> Tensor:
    """H + damp mean(diag H) I in the order of the factor."""
    H = hessian[factor.order[:, None], factor.order]
    H.diagonal().add_(factor.damp * hessian.diagonal().mean())
    return H


def _check(weight: Tensor, hessian: Tensor | None, factor: Factor | None, needs_hessian: bool) -> None:
    if weight.dim() != 2 or weight.shape[1] % BLOCK:
        raise ValueError(
            f"weight has shape {list(weight.shape)}; a matrix is needed whose columns are a multiple of {BLOCK}"
        )
    if (hessian is None) != (factor is None):
        raise ValueError("the Hessian and its factor belong together; only one of them is given")
    if hessian is None or factor is None:
        if needs_hessian:
            raise ValueError("compensate and sweeps need a Hessian and its factor")
        return
    I = weight.shape[1]
    if hessian.shape != (I, I) or factor.U.shape != (I, I):
        raise ValueError(
            f"the Hessian is {list(hessian.shape)}, its U {list(factor.U.shape)}; the weight has {I} columns"
        )
    owner = factor.order.view(-1, BLOCK) // BLOCK
    if not bool((owner == owner[:, :1]).all()):
        raise ValueError(f"the factor's order mixes blocks of {BLOCK} columns")
