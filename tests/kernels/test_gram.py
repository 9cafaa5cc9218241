"""Sums of products of bfloat16 rows, against float64."""

import pytest
import torch
from torch import Tensor

from qlm.errors import UsageError
from qlm.kernels import cpu, cpu_ops
from qlm.numerics.gptq import finish_hessian_

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not installed")

# Of the largest element; float32 sums of 256 products, one after the other, and those sums again.
RELATIVE = 2e-6


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> cpu.Native:
    """The library, whatever QLM_KERNELS says."""
    library = cpu.library()
    monkeypatch.setattr(cpu_ops, "native", lambda: library)
    return library


needs_bf16 = pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16"), reason="this CPU has no AVX512-BF16"
)


def gram(x: Tensor, start: float = 0.0) -> Tensor:
    found = torch.full((x.shape[1], x.shape[1]), start)
    assert cpu_ops.add_gram_(found, x)
    return finish_hessian_(found, 1)


def rows(tokens: int, features: int, mean: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(tokens * features)
    return (torch.randn(tokens, features, generator=generator) + mean).bfloat16()


@needs_bf16
@pytest.mark.parametrize("features", [64, 128, 320])
@pytest.mark.parametrize("tokens", [1, 2, 255, 257, 1024, 1025, 3000])
def test_sums_are_those_of_float64(tokens: int, features: int) -> None:
    x = rows(tokens, features)
    exact = x.double().T @ x.double()
    torch.testing.assert_close(gram(x).double(), exact, rtol=0, atol=RELATIVE * exact.abs().max().item())
    torch.testing.assert_close(gram(x, 7.0).double(), exact + 7, rtol=0, atol=RELATIVE * exact.abs().max().item())


@needs_bf16
def test_the_number_of_threads_changes_no_bit() -> None:
    x = rows(1500, 256)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gram(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_bf16
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_row(bad: float) -> None:
    x = rows(300, 128, mean=0.0)
    x[123, 77] = bad
    assert (~gram(x).diagonal().isfinite()).nonzero().flatten().tolist() == [77]


@pytest.mark.parametrize(
    "x",
    [torch.ones(4, 64), torch.ones(4, 64).half(), torch.ones(4, 96).bfloat16(), torch.ones(64, 4).bfloat16().T],
    ids=["float32", "float16", "96 features", "transposed"],
)
def test_what_the_kernel_does_not_take_stays_as_it_was(x: Tensor) -> None:
    hessian = torch.full((x.shape[1], x.shape[1]), 3.0)
    assert not cpu_ops.add_gram_(hessian, x)
    assert bool((hessian == 3).all())


@needs_bf16
def test_other_instruction_sets_leave_it_to_torch(native: cpu.Native) -> None:
    try:
        for isa in native.supported:
            native.select_isa(isa)
            assert cpu_ops.add_gram_(torch.zeros(64, 64), rows(8, 64)) == (isa == "avx512vnni")
    finally:
        native.select_isa(None)


@needs_bf16
def test_features_that_are_no_multiple_are_refused(native: cpu.Native) -> None:
    x, hessian = rows(8, 96), torch.zeros(96, 96)
    with pytest.raises(UsageError, match="gram: 8 tokens of 96 features; features are a multiple of 64"):
        native.qlm_gram_bf16(cpu.borrowed_team().handle, x.data_ptr(), 8, 96, hessian.data_ptr())
