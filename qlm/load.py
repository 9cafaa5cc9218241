"""From a folder or hub id to transformers' own model: float, or quantized by any backend, ours or somebody else's.

This is the project's only door to transformers' model and tokenizer classes. Classes are picked by family and task, never by what
a folder names. A model starts as a skeleton without memory (parameters on the meta device, buffers real), and tensors are read
into it one at a time, so that loading never holds a checkpoint twice; `quantize` fills one block at a time the same way.
"""

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qlm.arch import FamilySpec, Task
from qlm.backends import BACKENDS, Backend, backend_of
from qlm.backends.base import refuse_not_finite
from qlm.checkpoint.config import read_config
from qlm.checkpoint.expected import check_tied_head, embedding_dtype, match_tensors, published_name
from qlm.checkpoint.reader import Checkpoint
from qlm.errors import DataError, Unavailable, UsageError
from qlm.formats import QUANTO_MAP
from qlm.formats.dtypes import FLOATS as FLOAT_NAMES
from qlm.formats.dtypes import torch_dtype
from qlm.formats.layout import TensorLayout, in_block
from qlm.kernels.cuda_ops import has_bfloat16
from qlm.tokenizer import read_tokenizer, special_tokens

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32})
ATTENTION = ("eager", "sdpa", "flash_attention_2")


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been checked against what its config implies, ready to be read into a skeleton.

    Attributes:
        scheme: path of each quantized linear (as in memory) to how `backend` stores it; empty for a float checkpoint.
        file_names: name of each tensor (as in memory) to its name in the files.
        dtype: of the embedding in the files.
    """

    checkpoint: Checkpoint
    spec: FamilySpec
    config: Any
    backend: Backend | None
    scheme: Mapping[str, Any]
    file_names: Mapping[str, str]
    dtype: torch.dtype

    def stored_names(self) -> list[str]:
        """Names in memory of the tensors that the files hold (a tied head they need not)."""
        return [name for name, stored in self.file_names.items() if stored in self.checkpoint.tensors]

    def read(self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Tensor:
        """The tensor of that name in memory, as the file holds it, or as `dtype`; it is looked at and converted on the device.

        Raises:
            DataError: a value is NaN or infinite, or too large for `dtype`.
        """
        tensor = self.checkpoint.read(self.file_names[name]).to(device)
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and path in self.scheme:
            # Packed codes, which bitsandbytes may hold as floats; seen as such some are NaN.
            return tensor
        # torch's isfinite does not know 8-bit floats.
        values = tensor.float() if tensor.is_floating_point() and tensor.dtype not in FLOATS else tensor
        refuse_not_finite(self.file_names[name], values)
        if dtype in (None, tensor.dtype):
            return tensor
        converted = tensor.to(dtype)
        if dtype != torch.float32 and tensor.numel() and not bool(torch.stack(converted.aminmax()).isfinite().all()):
            raise DataError(
                f"{self.file_names[name]}: {tensor.abs().max().item():.6g} does not fit into {dtype}; "
                "keep the checkpoint's own dtype, or use bfloat16 or float32"
            )
        return converted


def build_config(spec: FamilySpec, fields: Mapping[str, Any]) -> Any:
    """transformers' config of the family, built from checked fields."""
    import transformers

    try:
        return getattr(transformers, spec.config_class)(**fields)
    except Exception as error:  # transformers' strict configs raise several types of their own
        raise DataError(f"config.json: {type(error).__name__}: {error}") from None


def model_class(spec: FamilySpec, task: Task) -> type[nn.Module]:
    """transformers' class for a task. Raises UsageError where the family has none."""
    import transformers

    if task not in spec.model_classes:
        raise UsageError(f"task: {spec.model_type} has no class for {task!r}; it has {', '.join(spec.model_classes)}")
    return cast(type[nn.Module], getattr(transformers, spec.model_classes[task]))


def check_attention(attn_implementation: str, device: str) -> None:
    """Refuse an attention implementation that cannot run here."""
    if attn_implementation not in ATTENTION:
        raise UsageError(f"attn_implementation: {attn_implementation!r}; expected one of {', '.join(ATTENTION)}")
    if attn_implementation == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if not device.startswith("cuda"):
            raise Unavailable(
                f"attn_implementation: flash_attention_2 runs on CUDA only, not on {device!r}; use 'sdpa'"
            )
        if not is_flash_attn_2_available():
            raise Unavailable(
                "attn_implementation: flash_attention_2 needs the package flash-attn; install it or use 'sdpa'"
            )


def _check_flash(compute: torch.dtype, device: str) -> None:
    """Refuse what flash-attn's kernels would only at the first token."""
    if compute == torch.float32:
        raise UsageError(
            "attn_implementation: flash_attention_2 computes in bfloat16 or float16, and this model in float32; use 'sdpa' or another dtype"
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise Unavailable(
            f"attn_implementation: flash_attention_2 needs compute capability 8.0, which {name} has not; use 'sdpa'"
        )


def skeleton(spec: FamilySpec, config: Any, task: Task, attn_implementation: str) -> Any:
    """The model without memory: parameters on the meta device, buffers (rotary frequencies, masks) real."""
    from accelerate import init_empty_weights

    config._attn_implementation = attn_implementation
    with init_empty_weights(include_buffers=False):
        model = model_class(spec, task)(config)
    return model.eval()


def linear_paths(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def biases_everywhere(model: nn.Module) -> bool:
    """Whether all linears of the blocks have a bias, which can take the mean error of an output off."""
    return all(model.get_submodule(name).bias is not None for name in linear_paths(model) if in_block(name))


def block_paths(spec: FamilySpec, model: Any) -> list[str]:
    """Path of each block in the model."""
    prefix = spec.blocks if type(model).__name__ == spec.model_classes["base"] else f"{spec.prefix}.{spec.blocks}"
    return [f"{prefix}.{i}" for i in range(len(model.get_submodule(prefix)))]


def open_source(
    model: str | Path,
    *,
    revision: str | None = None,
    task: Task = "causal-lm",
    attn_implementation: str = "sdpa",
    new_head: bool = False,
) -> tuple[Source, Any]:
    """Open a checkpoint, check every tensor's name, shape and dtype, and build the skeleton to read it into.

    Raises:
        MissingInput, DataError: see checkpoint/reader.py; one line that names file and tensor.
    """
    checkpoint = Checkpoint.open(model, revision)
    spec, fields = read_config(checkpoint)
    config = build_config(spec, fields)
    empty = skeleton(spec, config, task, attn_implementation)

    dtype = torch_dtype(embedding_dtype(checkpoint, spec))
    backend, scheme = _read_scheme(checkpoint, empty, f"{spec.prefix}." if task == "base" else "", dtype)

    expected: dict[str, TensorLayout] = {}
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        path = name.rpartition(".")[0]
        if path in scheme and name.endswith(".weight"):
            assert backend is not None
            rows, columns = parameter.shape
            for suffix, layout in backend.layout((rows, columns), scheme[path]).items():
                expected[f"{path}.{suffix}"] = layout
        else:
            expected[name] = TensorLayout(tuple(parameter.shape), FLOAT_NAMES)

    optional = set(tied_names(spec, config, task))
    if new_head and task not in ("causal-lm", "base"):
        optional |= {name for name in expected if not name.startswith(f"{spec.prefix}.")}
    ignored = []
    if task != "causal-lm":
        ignored.append(rf"({spec.published_head}|{spec.head})\.weight")
    if new_head or task == "base":
        ignored.append(r"(score|qa_outputs|classifier)\.(weight|bias)")
    published = {name: published_name(spec, name, task) for name in expected}
    in_files = match_tensors(
        checkpoint,
        spec,
        {published[name]: layout for name, layout in expected.items()},
        optional={published[name] for name in optional},
        ignored=ignored,
    )
    file_names = {name: in_files[published[name]] for name in expected}
    for name in tied_names(spec, config, task):
        check_tied_head(checkpoint, file_names[name], file_names[f"{spec.prefix}.{spec.embedding}.weight"])
    return Source(checkpoint, spec, config, backend, scheme, file_names, dtype), empty


def _read_scheme(
    checkpoint: Checkpoint, empty: Any, within: str, dtype: torch.dtype
) -> tuple[Backend | None, dict[str, Any]]:
    """Who stores the quantized linears, and how each. Configs name them by their paths in the causal LM, which in a base model alone
    lie `within` its prefix."""
    backend: Backend
    if checkpoint.quantize_config is not None:
        config, backend = checkpoint.quantize_config, backend_of(checkpoint.quantize_config)
    elif (quanto_map := checkpoint.read_json(QUANTO_MAP)) is not None:
        config, backend = quanto_map, BACKENDS["quanto"]
    else:
        return None, {}
    scheme = backend.read(config, [within + path for path in linear_paths(empty)], dtype)
    return backend, {path.removeprefix(within): how for path, how in scheme.items()}


def tied_names(spec: FamilySpec, config: Any, task: Task) -> list[str]:
    """Names of the parameters that are the embedding under another name."""
    return [f"{spec.head}.weight"] if task == "causal-lm" and config.tie_word_embeddings else []


def fill(model: Any, source: Source, path: str = "", *, dtype: torch.dtype, device: str = "cpu") -> None:
    """Read everything under `path` (the whole model by default) into the skeleton: floats as `dtype`, quantized linears as modules.

    Tied heads are left to `tie_head`.
    """
    within = f"{path}." if path else ""
    for name in [n for n in source.scheme if n == path or n.startswith(within)]:
        _set_module(model, name, _quantized_module(source, model.get_submodule(name), name, dtype, device))
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name.startswith(within) and parameter.is_meta and source.file_names[name] in source.checkpoint.tensors:
            set_parameter(model, name, source.read(name, dtype, device))
    for name, buffer in model.named_buffers():
        if name.startswith(within) and buffer.device != torch.device(device):
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffer.to(device)


def _quantized_module(source: Source, linear: nn.Linear, path: str, dtype: torch.dtype, device: str) -> nn.Module:
    assert source.backend is not None
    shape = (linear.out_features, linear.in_features)
    tensors = {
        suffix: source.read(f"{path}.{suffix}", device=device)
        for suffix in source.backend.layout(shape, source.scheme[path])
    }
    bias = source.read(f"{path}.bias", dtype, device) if linear.bias is not None else None
    try:
        return source.backend.module(tensors, bias, shape, source.scheme[path], dtype).eval()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


def tie_head(model: Any, source: Source, task: Task) -> None:
    """Make the head the embedding, where the config says so."""
    for name in tied_names(source.spec, source.config, task):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = model.get_input_embeddings().weight


def resolve_dtype(dtype: str | torch.dtype | None, device: str, spec: FamilySpec) -> torch.dtype:
    """What a model computes in. None or "auto": fp32 on a CPU; on a GPU bf16 where the hardware has it, else fp16, but fp32 for OPT,
    whose residuals overflow fp16."""
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype, None)
        if dtype not in FLOATS:
            raise UsageError("dtype: expected one of auto, float32, bfloat16, float16")
    if isinstance(dtype, torch.dtype):
        if dtype not in FLOATS:
            raise UsageError(f"dtype: {dtype}; expected float32, bfloat16 or float16")
        return dtype
    if not device.startswith("cuda"):
        return torch.float32
    if has_bfloat16(device):
        return torch.bfloat16
    return torch.float32 if spec.model_type == "opt" else torch.float16


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UsageError(f"device: {device!r}; expected 'cpu', 'cuda' or 'cuda:N'") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise Unavailable(f"device: {device!r}, but torch sees no CUDA GPU here; use 'cpu'")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise Unavailable(
            f"device: {device!r}, but torch sees {torch.cuda.device_count()} CUDA GPUs here, numbered from cuda:0"
        )
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"device: {device!r}; expected 'cpu', 'cuda' or 'cuda:N'")


def available_gpus() -> dict[str, int]:
    """Device to its free bytes. Raises Unavailable where there is none."""
    count = torch.cuda.device_count()
    if not count:
        raise Unavailable("device: 'auto', but torch sees no CUDA GPU here; use 'cpu'")
    return {f"cuda:{index}": int(torch.cuda.mem_get_info(index)[0]) for index in range(count)}


def device_map(model: Any, source: Source, task: Task, devices: Mapping[str, int]) -> dict[str, str]:
    """Path of each block, and of each module outside the blocks, to a device: blocks in their order, as many bytes of them on each device
    as its share of `devices`' free bytes; what comes before them, and a tied head, on the first, what comes after on the last."""
    blocks, names = block_paths(source.spec, model), list(devices)
    stored = {name: source.checkpoint.tensors[source.file_names[name]].bytes for name in source.stored_names()}
    sizes = [sum(size for name, size in stored.items() if name.startswith(f"{path}.")) for path in blocks]
    ends = [end / sum(devices.values()) for end in itertools.accumulate(devices.values())]
    found, before = {}, 0
    for path, size in zip(blocks, sizes, strict=True):
        # Where its middle lies along all blocks.
        middle = (before + size / 2) / sum(sizes)
        found[path] = names[bisect.bisect_left(ends[:-1], middle)]
        before += size
    tied = {name.rpartition(".")[0] for name in tied_names(source.spec, source.config, task)}
    for name, module in model.named_modules():
        own = any(True for _ in itertools.chain(module.parameters(False), module.buffers(False)))
        # GPTBigCode's base model has a buffer of its own; what holds the blocks lies nowhere itself.
        holds_blocks = not name or any(path.startswith(f"{name}.") for path in blocks)
        if own and not holds_blocks and not name.startswith(tuple(f"{path}." for path in blocks)):
            comes_before = isinstance(module, nn.Embedding) or name in tied or "project_in" in name or "rotary" in name
            found[name] = names[0] if comes_before else names[-1]
    return found


def spread(model: Any, source: Source, where: Mapping[str, str], dtype: torch.dtype) -> None:
    """Fill each part of a skeleton on a device of its own; inputs follow. accelerate's `dispatch_model` would make new parameters of those
    that lie where they should already, quantized and tied ones among them."""
    from accelerate.utils import send_to_device

    def follow(device: str) -> Callable[..., Any]:
        return lambda module, args, kwargs: (send_to_device(args, device), send_to_device(kwargs, device))

    for path, device in where.items():
        fill(model, source, path, dtype=dtype, device=device)
        model.get_submodule(path).register_forward_pre_hook(follow(device), with_kwargs=True)
    first = model.get_input_embeddings().weight.device
    for name, module in model.named_modules():
        if not any(name == path or name.startswith(f"{path}.") for path in where):
            for leaf, buffer in module._buffers.items():
                module._buffers[leaf] = None if buffer is None else buffer.to(first)
    model.hf_device_map = dict(where)


def load(
    model: str | Path,
    *,
    task: Task = "causal-lm",
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    revision: str | None = None,
    new_head: bool = False,
) -> Any:
    """Load a float or quantized model of one of the three families as transformers' own class.

    Args:
        model: a folder, a hub cache folder, or a hub id (`facebook/opt-125m`).
        task: "causal-lm", "sequence-classification", "token-classification", "question-answering" or "base", as far as the family
            has it.
        device: "cpu", "cuda", "cuda:N", or "auto": all GPUs, the blocks in order, by what is free on each.
        dtype: what to compute in; None picks by device (`resolve_dtype`). Quantized weights stay as they are stored.
        attn_implementation: "eager", "sdpa" or "flash_attention_2".
        new_head: start a task's head anew where the checkpoint has none, from torch's seed; without it that is an error. Such
            a model has an attribute `has_new_head`.
    Returns:
        the model in evaluation mode, every parameter read exactly once.
    Raises:
        QlmError: one line that names the file, the tensor or the field.
    """
    devices = available_gpus() if device == "auto" else {}
    device = next(iter(devices), device)
    check_device(device)
    check_attention(attn_implementation, device)
    source, loaded = open_source(
        model, revision=revision, task=task, attn_implementation=attn_implementation, new_head=new_head
    )
    compute = resolve_dtype(dtype, device, source.spec)
    if attn_implementation == "flash_attention_2":
        _check_flash(compute, device)
    if len(devices) > 1:
        spread(loaded, source, device_map(loaded, source, task, devices), compute)
    else:
        fill(loaded, source, dtype=compute, device=device)
    tie_head(loaded, source, task)
    if new_head:
        for name, parameter in list(loaded.named_parameters()):
            if parameter.is_meta:
                loaded.has_new_head = True
                place = getattr(loaded, "hf_device_map", {}).get(name.rpartition(".")[0], device)
                fresh = torch.zeros(parameter.shape, device=place, dtype=compute)
                set_parameter(loaded, name, fresh.normal_(0.0, 0.02) if parameter.ndim > 1 else fresh)
    unread = [name for name, tensor in _all_tensors(loaded) if tensor.is_meta]
    assert not unread, f"not read: {unread}"
    loaded.config.dtype = compute
    return loaded


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def load_tokenizer(model: str | Path, *, revision: str | None = None) -> Any:
    """The checkpoint's tokenizer as transformers' PreTrainedTokenizerFast, with BOS by the family's rule.

    See tokenizer.py for what is read and what is refused.
    """
    from transformers import PreTrainedTokenizerFast

    checkpoint = Checkpoint.open(model, revision)
    spec, fields = read_config(checkpoint)
    tokenizer = read_tokenizer(checkpoint)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=int(fields[spec.positions]),
        clean_up_tokenization_spaces=False,
        **special_tokens(spec, fields, tokenizer),
    )
