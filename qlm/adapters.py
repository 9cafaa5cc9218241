"""LoRA adapters: put onto a model, and made into a folder's content. The project's only door to peft; checkpoint/adapter.py reads a
folder.

Adapters lie on the linears of the blocks, those that the family's `lora_targets` name or a recipe's globs match; never on the
language-model head. PEFT's own layers do the work: `Linear` over float linears, its bitsandbytes `Linear4bit` over NF4, and over
int8 and GPTQ, which it does not know, `Linear` again through its hook for custom modules, for those modules compute x W^T + b as
any linear does. A task's head (score, classifier, qa_outputs) is trained in full, by `modules_to_save`.

Adapter weights are float32 whatever the base computes in: PEFT (`autocast_adapter_dtype`) makes those of a 16-bit base float32 after
it has rounded them, and what is written here afterwards is not rounded. A layer casts its input to them and its output back. A head
in full keeps the dtype of the base.
"""

import fnmatch
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlm.arch import FAMILIES, HEADS, FamilySpec, Task
from qlm.backends.gptq import GptqLinear
from qlm.backends.int8 import Int8Linear
from qlm.checkpoint.adapter import TASK_TYPES, Adapter, read_adapter
from qlm.errors import UsageError
from qlm.kernels.ops import dequantize_gptq
from qlm.load import block_paths
from qlm.recipe import SVD_BITS

if TYPE_CHECKING:
    from qlm.recipe import AdapterRecipe

# --- which linears ----------------------------------------------------------------------------------------------------


def linear_shapes(model: Any, spec: FamilySpec) -> dict[str, tuple[int, int]]:
    """Path of each linear of the blocks to (O, I), in the order of the model; it may be a skeleton, quantized, or have adapters."""
    base = _base(model)
    inner = [linear for stage in spec.stages for group in stage for linear in group.linears]
    shapes = {}
    for path in (f"{block}.{linear}" for block in block_paths(spec, base) for linear in inner):
        linear: Any = base.get_submodule(path)
        linear = getattr(linear, "base_layer", linear)
        shapes[path] = (linear.out_features, linear.in_features)
    return shapes


def choose_targets(linears: Sequence[str], spec: FamilySpec, targets: str | Sequence[str]) -> list[str]:
    """Paths of the linears that get an adapter, in the order of `linears`.

    Args:
        targets: "all_linear", or globs of paths or of their ends: `q_proj`, `attn.c_proj`, `*.layers.0.*`.

    Raises:
        UsageError: a glob that matches none.
    """
    if isinstance(targets, str):
        return [path for path in linears if path.rpartition(".")[2] in spec.lora_targets]
    chosen: set[str] = set()
    for glob in targets:
        found = {path for path in linears if fnmatch.fnmatchcase(path, glob) or fnmatch.fnmatchcase(path, f"*.{glob}")}
        if not found:
            ends = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in linears))
            raise UsageError(
                f"adapter.targets: {glob!r} matches none of the model's linears, such as {linears[0]!r}; their names end in "
                f"{ends}, and the head takes no adapter"
            )
        chosen |= found
    return [path for path in linears if path in chosen]


def _named(base: nn.Module, chosen: Sequence[str]) -> list[str]:
    """What `target_modules` calls the linears: the ends of their paths where those mean the same linears, else their paths."""
    ends = {path.rpartition(".")[2] for path in chosen}
    meant = {path for path, _ in base.named_modules() if path.rpartition(".")[2] in ends}
    # Linears that have an adapter already contain others: `fc1.base_layer`.
    return sorted(ends) if meant == set(chosen) else sorted(chosen)


# --- onto a model -----------------------------------------------------------------------------------------------------


def attach(
    model: Any,
    spec: FamilySpec,
    adapter: "AdapterRecipe",
    task: Task,
    seed: int,
    name: str = "default",
    float_weight: Callable[[str], Tensor] | None = None,
) -> Any:
    """A fresh adapter on a model, changed in place, whose own parameters are frozen.

    Args:
        model: from `qlm.load`, float, nf4, int8 or gptq; or one that has adapters already.
        adapter: the recipe's section. `initialization: standard`: A uniform in +-1/sqrt(I) from `seed` alone, B zero. `svd`: B A times
            the scaling alpha / r is the nearest matrix of rank r to W - Q, what quantizing took from the weight (LoftQ,
            arXiv:2310.08659, with one step; W - Q unweighted), for GPTQ of 3 bits and less; ranks that it does not need start as standard.
        seed: the same seed gives the same bytes. torch's global random state is neither used nor changed.
        name: of the adapter, among several on one model.
        float_weight: for `svd`: the path of a linear in the model to the weight [O, I] that it was quantized from.
    Returns:
        the PeftModel, in the mode (training or evaluation) that the model was in, with the new adapter active.
    Raises:
        UsageError: targets that match nothing, a backend without adapters, or `svd` where it means nothing.
    """
    from peft import LoraConfig

    base = _base(model)
    chosen = choose_targets(list(linear_shapes(model, spec)), spec, adapter.targets)
    _refuse_adapted(model, name)
    _refuse_backend(base, chosen)
    if adapter.initialization == "svd":
        _check_svd(base, chosen, float_weight)
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=2 * adapter.r if adapter.alpha is None else adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=_named(base, chosen),
        task_type=TASK_TYPES[task],
    )
    made = _inject(model, config, name, chosen)
    made.set_adapter(name)
    generator = torch.Generator().manual_seed(seed)
    for path in chosen:
        layer = _base(made).get_submodule(path)
        a, b = _standard(layer, name, generator)
        if adapter.initialization == "svd":
            assert float_weight is not None
            weight = float_weight(path).detach()
            base_layer = layer.base_layer
            quantized = dequantize_gptq(
                base_layer.qweight, base_layer.qzeros, base_layer.scales, base_layer.g_idx, base_layer.bits, base_layer.v2
            )  # fmt: skip
            a, b = _repairing(weight, quantized, layer.scaling[name], a, b, path)
        _set_pair(layer, name, a, b)
    return made


def apply_adapter(model: Any, folder: "str | Path | Adapter", name: str = "default", trainable: bool = False) -> Any:
    """Put an adapter from a folder onto a model, changed in place.

    Args:
        model: as `attach` takes it, for the adapter's task; a head that was started anew takes the adapter's size and labels.
        folder: or the adapter in it, where that has been read already. Shapes are compared with the model's; which base it was trained
            on is not asked here (`qlm generate`, `qlm evaluate` and `qlm.Engine` do).
        name: of the adapter. The first is active at once; of several, `set_adapter` chooses one, and `disable_adapter()` is the model
            without any.
        trainable: whether its weights have gradients.
    Returns:
        the PeftModel, in the mode that the model was in.
    Raises:
        DataError: see `read_adapter`; or the adapter is for another family, size or task, naming the first linear.
    """
    from peft import LoraConfig

    base = _base(model)
    spec = FAMILIES[base.config.model_type]
    adapter = folder if isinstance(folder, Adapter) else read_adapter(folder)
    _refuse_adapted(model, name)
    _fit_head(base, adapter)
    adapter.check(linear_shapes(model, spec), _head_shapes(base), spec.model_type)
    chosen = list(adapter.deltas())
    _refuse_backend(base, chosen)
    fields = adapter.config
    config = LoraConfig(
        r=fields["r"],
        lora_alpha=fields["lora_alpha"],
        lora_dropout=fields["lora_dropout"],
        use_rslora=fields["use_rslora"],
        rank_pattern=dict(fields["rank_pattern"]),
        alpha_pattern=dict(fields["alpha_pattern"]),
        target_modules=_named(base, chosen),
        task_type=TASK_TYPES[adapter.task],
        inference_mode=not trainable,
    )
    made = _inject(model, config, name, chosen)
    for path, delta in adapter.deltas().items():
        layer = _base(made).get_submodule(path)
        assert math.isclose(layer.scaling[name], delta.scaling), path
        _set_pair(layer, name, torch.from_numpy(delta.a), torch.from_numpy(delta.b))
    for full, tensor in adapter.heads().items():
        head, _, leaf = full.rpartition(".")
        wrapper: Any = _base(made).get_submodule(head)
        with torch.no_grad():
            wrapper.modules_to_save[name].get_parameter(leaf).copy_(torch.from_numpy(tensor))
    return made


def resize_head(model: Any, name: str, labels: int) -> None:
    """A fresh head for so many labels, from torch's seed, in the place of a fresh one for another number."""
    head = getattr(model, name)
    fresh = nn.Linear(
        head.in_features, labels, bias=head.bias is not None, device=head.weight.device, dtype=head.weight.dtype
    )
    nn.init.normal_(fresh.weight, std=0.02)
    if fresh.bias is not None:
        nn.init.zeros_(fresh.bias)
    setattr(model, name, fresh.train(head.training))
    model.config.num_labels = model.num_labels = labels


def _fit_head(base: Any, adapter: Adapter) -> None:
    """Let a head that `load` has started anew have the adapter's size, and its labels their names, where those are on record."""
    head = HEADS.get(adapter.task)
    if head is None or adapter.task == "question-answering" or not getattr(base, "has_new_head", False):
        return
    count = len(next(iter(adapter.heads().values()), ()))
    if count and count != getattr(base, head).out_features:
        resize_head(base, head, count)
    names = adapter.labels()
    if len(names) == count:
        base.config.id2label = dict(enumerate(names))
        base.config.label2id = {name: number for number, name in enumerate(names)}


def _base(model: Any) -> Any:
    """transformers' model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _refuse_adapted(model: Any, name: str) -> None:
    if name in getattr(model, "peft_config", {}):
        raise UsageError(f"adapter: the model has one called {name!r} already; give another name")


def _refuse_backend(base: Any, chosen: Sequence[str]) -> None:
    for path in chosen:
        linear = base.get_submodule(path)
        linear = getattr(linear, "base_layer", linear)
        if type(linear) is not nn.Linear and not isinstance(linear, Int8Linear | GptqLinear) and not _is_nf4(linear):
            raise UsageError(
                f"adapter: {path} is a {type(linear).__name__}, which takes no adapter; float, nf4, int8 and gptq linears do"
            )


def _is_nf4(linear: nn.Module) -> bool:
    # Not isinstance, which would import bitsandbytes for models that have none of it.
    return type(linear).__module__ == "qlm.backends.nf4_linear"


def _inject(model: Any, config: Any, name: str, chosen: Sequence[str]) -> Any:
    """The PeftModel with one more adapter, whose weights are yet to be set."""
    from peft import PeftModel, get_peft_model
    from peft.tuners.lora.bnb import Linear4bit

    base, training = _base(model), model.training
    kinds = {type(getattr(linear, "base_layer", linear)) for linear in map(base.get_submodule, chosen)}
    config._register_custom_module(
        # PEFT takes its Linear4bit where a flag says that transformers has loaded the model with bitsandbytes; accelerate and the
        # Trainer draw other conclusions from that flag.
        {kind: Linear4bit for kind in kinds if kind.__module__ == "qlm.backends.nf4_linear"}
        | {kind: _lora_over_quantized() for kind in kinds & {Int8Linear, GptqLinear}}
    )
    with _no_randomness(), warnings.catch_warnings():
        # That it does not know qlm's modules is what the hook is for; the other is about its own use of transformers.
        warnings.filterwarnings("ignore", "Unsupported layer type")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")
        if isinstance(model, PeftModel):
            made = model
            made.add_adapter(name, config)
        else:
            made = get_peft_model(model, config, adapter_name=name)
    # PEFT leaves new modules in training mode, dropout and all, whatever mode the model is in.
    return made.train(training)


@functools.cache
def _lora_over_quantized() -> Any:
    from peft.tuners.lora.layer import Linear

    class LoraOverQuantized(Linear):
        """PEFT's layer over `Int8Linear` and `GptqLinear`: y = base(x) + scaling * B A x. Neither weight can take the product in."""

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            kind = type(self.get_base_layer()).__name__
            raise UsageError(
                f"adapter: cannot be added to the quantized weight of a {kind}; qlm merge makes a new checkpoint"
            )

    return LoraOverQuantized


@contextmanager
def _no_randomness() -> Iterator[None]:
    """Whatever is drawn inside leaves torch's global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        yield


def _standard(layer: Any, name: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A [r, I] as `nn.Linear` starts its weight, kaiming_uniform with a = sqrt(5), and B [O, r] of zeros."""
    r, I = layer.lora_A[name].weight.shape
    a = torch.empty(r, I).uniform_(-1 / math.sqrt(I), 1 / math.sqrt(I), generator=generator)
    return a, torch.zeros(layer.lora_B[name].weight.shape)


def _set_pair(layer: Any, name: str, a: Tensor, b: Tensor) -> None:
    with torch.no_grad():
        layer.lora_A[name].weight.copy_(a)
        layer.lora_B[name].weight.copy_(b)


# --- the start that repairs ---------------------------------------------------------------------------------------------


def _check_svd(base: Any, chosen: Sequence[str], float_weight: Callable[[str], Tensor] | None) -> None:
    kinds = {path: base.get_submodule(path) for path in chosen}
    for path, linear in kinds.items():
        linear = getattr(linear, "base_layer", linear)
        if type(linear) is nn.Linear:
            raise UsageError(
                f"adapter.initialization: svd repairs what quantizing took, and {path} is not quantized; use standard"
            )
        # What is neither is NF4.
        bits = linear.bits if isinstance(linear, GptqLinear) else 8 if isinstance(linear, Int8Linear) else 4
        if bits > SVD_BITS:
            raise UsageError(
                f"adapter.initialization: svd is for {SVD_BITS} bits and less, and {path} has {bits}; use standard"
            )
    if float_weight is None:
        raise UsageError(
            "adapter.initialization: svd needs the float weights that the model was quantized from; give the float model, "
            "or use standard"
        )


def _repairing(
    weight: Tensor, quantized: Tensor, scaling: float, a: Tensor, b: Tensor, path: str
) -> tuple[Tensor, Tensor]:
    """A and B with scaling * B A = the nearest matrix of their rank to E = weight - quantized, all [O, I].

    The singular vectors are eigenvectors of E^T E or E E^T, the smaller, in float64: that squares the singular values, which costs the
    large ones that are kept nothing.
    """
    if weight.shape != quantized.shape:
        raise UsageError(
            f"adapter.initialization: {path} is {list(weight.shape)} in the float model and {list(quantized.shape)} in the "
            "quantized one; give the float model that it was made from"
        )
    error = weight.to(quantized.device, torch.float64) - quantized.double()
    size, all_of_it = float(error.norm()), float(weight.double().norm())
    if not math.isfinite(size) or size > all_of_it:
        raise UsageError(
            f"adapter.initialization: {path} differs from the float weight by {size:.3g}, which is more than all of it "
            f"({all_of_it:.3g}); give the float model that it was made from"
        )
    wide = error.shape[0] < error.shape[1]
    _, vectors = torch.linalg.eigh(error @ error.T if wide else error.T @ error)
    kept = vectors[:, -len(a) :].flip(1)
    left, right = (kept, (kept.T @ error)) if wide else (error @ kept, kept.T)
    # One of the two holds unit vectors, the other these times the singular values.
    values = (right if wide else left).norm(dim=1 if wide else 0)
    used = values > values.max() * 1e-7
    root = (values / scaling).sqrt()[used]
    unit_left = left[:, used] if wide else left[:, used] / values[used]
    unit_right = right[used] / values[used, None] if wide else right[used]
    a, b = a.clone(), b.clone()
    places = used.nonzero()[:, 0].cpu()
    a[places] = (root[:, None] * unit_right).float().cpu()
    b[:, places] = (unit_left * root).float().cpu()
    return a, b


# --- out of a model -----------------------------------------------------------------------------------------------------


def files_of(model: Any, base: str, name: str = "default") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a folder of the adapter holds, in PEFT's own names.

    Args:
        base: what adapter_config.json calls the base.
    Returns:
        tensors of adapter_model.safetensors, on the CPU, sorted by name; content of adapter_config.json, the same for the same adapter.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {key: state[key].detach().to("cpu", copy=True).contiguous() for key in sorted(state)}
    config = model.peft_config[name].to_dict()
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    for key, value in config.items():
        if isinstance(value, set | frozenset):
            config[key] = sorted(value)
        elif isinstance(value, list):
            # PEFT adds the heads of a task to those that are there already.
            config[key] = list(dict.fromkeys(value))
        elif hasattr(value, "value"):
            config[key] = value.value
    return tensors, config


def _head_shapes(base: Any) -> dict[str, tuple[int, ...]]:
    """Name of each parameter of the heads in HEADS that a model has to its shape."""
    found: dict[str, tuple[int, ...]] = {}
    for head in HEADS.values():
        module = getattr(base, head, None)
        module = getattr(module, "original_module", module)
        if isinstance(module, nn.Module):
            found |= {f"{head}.{name}": tuple(p.shape) for name, p in module.named_parameters()}
    return found
