"""A folder with a LoRA adapter, PEFT's `adapter_model.safetensors` and `adapter_config.json`, read and checked; and which base it
belongs to. No torch and no peft here: the CPU engine reads adapters too.

A folder from elsewhere is taken at its word or refused: tensors are read with the checks of every checkpoint, fields of
adapter_config.json that would change numbers in a way that is not done here are errors, and nothing that a config names is imported. A
folder with a manifest must hold the bytes that this names: a flipped bit in a weight shows nowhere else.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qlm.arch import HEADS, Task
from qlm.checkpoint import manifest, strict_json
from qlm.checkpoint.folder import ModelFolder, is_plain_name, read_into
from qlm.checkpoint.reader import Checkpoint, read_header
from qlm.checkpoint.safetensors_header import TensorInfo
from qlm.errors import DataError, MissingInput, QlmError
from qlm.formats.dtypes import FLOATS, NUMPY_DTYPES, to_float32

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What PEFT puts before the path of a module in the model.
PREFIX = "base_model.model."
TASK_TYPES: dict[Task, str] = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "base": "FEATURE_EXTRACTION",
}
_MAX_CONFIG_BYTES = 1 << 20
# Fields of adapter_config.json (peft 0.21, `LoraConfig`) that are allowed with these values only: others change numbers.
_FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    # pissa, olora, corda, loftq and lora_ga change the weights of the base as well.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "ensure_weight_tying": (False, None),
    "use_bdlora": (False, None),
    "layer_replication": (None,),
    # Of PEFT before 0.4.
    "enable_lora": (None,),
    "merge_weights": (False, None),
    "megatron_config": (None,),
    "megatron_core": (None, "megatron.core"),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "corda_config": (None,),
    "kasa_config": (None,),
    "lora_ga_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
# Without effect on numbers where the tensors are known. Which linears have an adapter is what the tensors say.
_INERT = frozenset(
    {
        "base_model_name_or_path", "revision", "inference_mode", "peft_version", "loftq_config", "eva_config", "qalora_group_size",
        "exclude_modules", "layers_to_transform", "layers_pattern", "auto_mapping", "task_type",
    }
)  # fmt: skip
_USED = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "target_modules",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
    }
)


class Delta(NamedTuple):
    """What an adapter adds to the weight of a linear: scaling * B A. A fp32 [r, I], B fp32 [O, r]."""

    a: np.ndarray
    b: np.ndarray
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, read and checked.

    Attributes:
        config: fields of adapter_config.json that have an effect, defaults filled in.
        tensors: float32, by PEFT's names.
        task: of the head, by `task_type` or the head that is there.
        on_record: {name: {"bytes", "sha256"}} of the two files, compared with the folder's manifest; None where it has none.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    task: Task
    on_record: dict[str, dict[str, Any]] | None = None

    def deltas(self) -> dict[str, Delta]:
        """Path of each adapted linear, in the base model as transformers has it in memory, to what the adapter adds."""
        found = {}
        for key, a in self.tensors.items():
            path, is_a, _ = key.removeprefix(PREFIX).partition(".lora_A.")
            if is_a:
                b = self.tensors[f"{PREFIX}{path}.lora_B.weight"]
                found[path] = Delta(a, b, self._scaling(path, len(a)))
        return found

    def heads(self) -> dict[str, np.ndarray]:
        """Parameters of a head that was trained in full, by their names in the model: "score.weight"."""
        return {key.removeprefix(PREFIX): t for key, t in self.tensors.items() if ".lora_" not in key}

    def labels(self) -> list[str]:
        """The names of the labels that it was trained with, as its manifest has them; none where it does not say."""
        if not (self.folder / manifest.NAME).is_file():
            return []
        return [str(name) for name in manifest.read(self.folder).get("training", {}).get("labels") or ()]

    def facts(self) -> dict[str, dict[str, Any]]:
        """{name: {"bytes", "sha256"}} of the files that decide what it adds."""
        files = [self.folder / CONFIG, self.folder / WEIGHTS]
        return manifest.input_facts(files) if self.on_record is None else self.on_record

    def _scaling(self, path: str, r: int) -> float:
        alpha = _by_pattern(self.config["alpha_pattern"], path, self.config["lora_alpha"])
        return float(alpha / math.sqrt(r) if self.config["use_rslora"] else alpha / r)

    def check(self, linears: Mapping[str, tuple[int, int]], heads: Mapping[str, tuple[int, ...]], family: str) -> None:
        """Refuse an adapter of another model.

        Args:
            linears: path of each linear of the base's blocks to (O, I).
            heads: name of each parameter of its task's head to its shape; a size of -1 is any.

        Raises:
            DataError: naming the first linear, what was found and what the base has.
        """
        file, deltas = self.folder / WEIGHTS, self.deltas()
        for path, delta in deltas.items():
            if path not in linears:
                raise DataError(
                    f"{file}: has an adapter for {path}, which this {family} does not have (it has {next(iter(linears))} and "
                    f"{len(linears) - 1} more); it belongs to another base"
                )
            found = (delta.b.shape[0], delta.a.shape[1])
            if found != linears[path]:
                raise DataError(
                    f"{file}: {path}: the adapter is for {list(found)} weights, the base has {list(linears[path])} there; it "
                    "belongs to another base"
                )
        missing = [path for path in linears if path not in deltas and self._means(path)]
        if missing:
            raise DataError(
                f"{file}: lacks the tensors of {missing[0]} ({len(missing)} linears in all), which target_modules of {CONFIG} "
                "names; the file is damaged or belongs to another base"
            )
        for name, tensor in self.heads().items():
            if name not in heads:
                raise DataError(
                    f"{file}: holds {name}, the head of the task {self.task}, and the model has none; load it for that task"
                )
            expected = heads[name]
            if any(want not in (size, -1) for size, want in zip(tensor.shape, expected, strict=True)):
                raise DataError(
                    f"{file}: {name} has shape {list(tensor.shape)}, the model's is {list(expected)}; they differ in their labels "
                    "or are of another base"
                )
        for name in heads:
            if name not in self.heads() and self.task in HEADS:
                raise DataError(f"{file}: lacks {name}, the head of its task {self.task}; the file is damaged")

    def _means(self, path: str) -> bool:
        """Whether `target_modules` alone says that a linear has an adapter; not known where other fields narrow it down."""
        targets = self.config["target_modules"]
        if isinstance(targets, str) or self.config["narrowed"]:
            return False
        return any(path == end or path.endswith(f".{end}") for end in targets)


def read_adapter(folder: str | Path) -> Adapter:
    """An adapter's folder, with every tensor and every field of its config checked.

    Raises:
        MissingInput: no such folder, or a file is not there.
        DataError: a file is damaged or is not the one that the folder's manifest names, a value is NaN or infinite, or a field asks for
            what is not done here.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise MissingInput(
            f"adapter {path}: {'is a file; expected the folder that holds it' if path.exists() else 'no such folder'}"
        )
    opened = ModelFolder(path)
    for name in (CONFIG, WEIGHTS):
        if opened.path(name) is None:
            pickled = (
                "; adapter_model.bin is a pickle: save it as safetensors"
                if (path / "adapter_model.bin").exists()
                else ""
            )
            raise MissingInput(f"{opened.folder}: has no {name}; expected an adapter's folder{pickled}")
    on_record = _as_on_record(opened)
    source = str(opened.folder / CONFIG)
    raw = strict_json.load_object(opened.read(CONFIG, _MAX_CONFIG_BYTES), source, _MAX_CONFIG_BYTES)
    config = _read_config(raw, source)
    tensors = _read_tensors(opened)
    _check_names(tensors, config, opened.folder / WEIGHTS)
    held = {key.removeprefix(PREFIX).partition(".")[0] for key in tensors if ".lora_" not in key}
    task: Task = next((task for task, head in HEADS.items() if head in held), "causal-lm")
    if raw.get("task_type") is not None:
        named = next((task for task, kind in TASK_TYPES.items() if kind == raw["task_type"]), None)
        if named is None:
            raise DataError(f"{source}: task_type is {raw['task_type']!r}; qlm knows {', '.join(TASK_TYPES.values())}")
        if held - {HEADS.get(named, "")}:
            raise DataError(
                f"{opened.folder / WEIGHTS}: holds a {min(held)}, and task_type of {CONFIG} is {raw['task_type']}"
            )
        task = named
    return Adapter(opened.folder, config, tensors, task, on_record)


def _as_on_record(folder: ModelFolder) -> dict[str, dict[str, Any]] | None:
    """{name: {"bytes", "sha256"}} of the two files, which are those that the folder's manifest names; None where it has no manifest."""
    if folder.path(manifest.NAME) is None:
        return None
    outputs = manifest.read(folder.folder)["outputs"]
    found = manifest.input_facts([folder.folder / CONFIG, folder.folder / WEIGHTS])
    for name, facts in found.items():
        if facts != outputs.get(name):
            recorded = f"{outputs[name]['sha256'][:12]}…" if name in outputs else "nothing of it"
            raise DataError(
                f"{folder.folder / name}: changed since it was written: its SHA-256 is {facts['sha256'][:12]}…, {manifest.NAME} says "
                f"{recorded}; get it anew, or remove {manifest.NAME} if the change is meant"
            )
    return found


def _read_config(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The fields that have an effect, checked."""
    for field, value in raw.items():
        if field in _FIXED:
            allowed = _FIXED[field]
            if not any(type(value) is type(a) and value == a for a in allowed):
                words = " or ".join(repr(a) for a in allowed if a is not None) or "null"
                raise DataError(
                    f"{source}: {field} is {value!r}, which changes what the adapter computes; qlm reads {words}"
                )
        elif field not in _INERT | _USED:
            raise DataError(f"{source}: unknown field {field!r}; it may change numbers, so it is not ignored")
    if "peft_type" not in raw:
        raise DataError(f"{source}: has no peft_type; expected the config of a LoRA adapter")
    mapping = raw.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    # PEFT writes where transformers has the class; qlm knows that itself.
    if mapping is not None and not (isinstance(library, str) and library.startswith("transformers.models.")):
        raise DataError(f"{source}: auto_mapping asks for code to be imported, which qlm never does; remove it")
    plain: dict[str, Any] = {
        "r": raw.get("r", 8), "lora_alpha": raw.get("lora_alpha", 8), "lora_dropout": raw.get("lora_dropout", 0.0),
        "use_rslora": raw.get("use_rslora", False), "target_modules": raw.get("target_modules") or [],
        "modules_to_save": raw.get("modules_to_save") or [], "rank_pattern": raw.get("rank_pattern") or {},
        "alpha_pattern": raw.get("alpha_pattern") or {},
        "narrowed": any(raw.get(field) not in (None, []) for field in ("exclude_modules", "layers_to_transform", "layers_pattern")),
    }  # fmt: skip
    for field, is_right, expected in (
        ("r", _is_rank, "a whole number from 1 on"),
        ("lora_alpha", _is_alpha, "a number above 0"),
        ("lora_dropout", lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 on and below 1"),
        ("use_rslora", lambda v: isinstance(v, bool), "true or false"),
        ("target_modules", lambda v: isinstance(v, str) or _are_texts(v), "a list of names"),
        ("modules_to_save", _are_texts, "a list of names"),
        ("rank_pattern", lambda v: _is_pattern(v, _is_rank), "names of linears with their ranks"),
        ("alpha_pattern", lambda v: _is_pattern(v, _is_alpha), "names of linears with numbers above 0"),
    ):
        if not is_right(plain[field]):
            raise DataError(f"{source}: {field} is {plain[field]!r}; expected {expected}")
    return plain


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 1 << 16


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and value > 0


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_pattern(value: Any, is_right: Callable[[Any], bool]) -> bool:
    # To PEFT the names are regular expressions; those that are more than the end of a path are not read.
    return isinstance(value, dict) and all(re.fullmatch(r"\^?[\w.]+", key) and is_right(v) for key, v in value.items())


def _by_pattern(pattern: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    """PEFT's rule (`get_pattern_key`): the first name that is the path's end, at a dot; one with ^ is all of it."""
    for key, value in pattern.items():
        if path == key.removeprefix("^") or (not key.startswith("^") and path.endswith(f".{key}")):
            return value
    return otherwise


def _read_tensors(folder: ModelFolder) -> dict[str, np.ndarray]:
    file = folder.folder / WEIGHTS
    with folder.open(WEIGHTS) as descriptor:
        tensors, _ = read_header(descriptor, file)
        return {name: _read_tensor(descriptor, name, info, file) for name, info in sorted(tensors.items())}


def _read_tensor(descriptor: int, name: str, info: TensorInfo, file: Path) -> np.ndarray:
    """As float32."""
    if info.dtype not in FLOATS:
        raise DataError(f"{file}: {name} is {info.dtype}; expected {' or '.join(sorted(FLOATS))}")
    stored = np.empty(info.shape, NUMPY_DTYPES[info.dtype])
    if stored.size:
        read_into(descriptor, stored.reshape(-1).view(np.uint8).data, info.offset, file)
    tensor = to_float32(stored, info.dtype)
    bad = ~np.isfinite(tensor)
    if bad.any():
        raise DataError(
            f"{file}: {name}: {int(bad.sum())} of {bad.size} values are NaN or infinite, the first at {np.argwhere(bad)[0].tolist()}; "
            "the adapter is damaged"
        )
    return tensor


_LORA_NAME = re.compile(re.escape(PREFIX) + r"([\w.]+)\.lora_([AB])\.weight")
_HEAD_NAME = re.compile(re.escape(PREFIX) + rf"({'|'.join(HEADS.values())})\.(weight|bias)")


def _check_names(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], file: Path) -> None:
    """Pairs of A and B of the right rank, and heads; nothing else."""
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        if found := _LORA_NAME.fullmatch(name):
            pairs.setdefault(found[1], {})[found[2]] = tensor
        elif not _HEAD_NAME.fullmatch(name):
            raise DataError(
                f"{file}: {name} is not known; expected {PREFIX}….lora_A.weight and lora_B of linears, or a task's head"
            )
    if not pairs:
        raise DataError(f"{file}: holds no adapter for any linear")
    for path, pair in pairs.items():
        for side in "AB":
            if side not in pair:
                raise DataError(f"{file}: {path} lacks its lora_{side}.weight")
        r = _by_pattern(config["rank_pattern"], path, config["r"])
        for side, axis in (("A", 0), ("B", 1)):
            shape = list(pair[side].shape)
            if len(shape) != 2 or shape[axis] != r or 0 in shape:
                expected = f"[{r}, in features]" if side == "A" else f"[out features, {r}]"
                raise DataError(f"{file}: {path}: lora_{side}.weight has shape {shape}; {CONFIG} implies {expected}")


# --- which base it belongs to -------------------------------------------------------------------------------------------


def base_facts(
    base: str | Path, revision: str | None = None, files: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """What the manifest of an adapter says about its base, under "base".

    Args:
        files: {name: {"bytes", "sha256"}} of its files, where they have been hashed already.
    Returns:
        "files": {name: {"bytes", "sha256"}} of the files that decide what the base computes. "float_files": the same of the float
        checkpoint that it was quantized from, where its own manifest says so, else {}. "smoothed": whether scales were moved from
        its activations into its weights, so that adapters for it do not fit the float weights.
    """
    checkpoint = Checkpoint.open(base, revision)
    facts: dict[str, Any] = {
        "files": manifest.input_facts(checkpoint.files()) if files is None else dict(files), "float_files": {}, "smoothed": False,
    }  # fmt: skip
    if checkpoint.quantize_config is not None and checkpoint.path(manifest.NAME) is not None:
        facts["float_files"], facts["smoothed"] = _made_from(manifest.read(checkpoint.folder))
    return facts


def _made_from(written: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Of a quantized folder's manifest: facts of the float files that it was made from, {} where they are not on record; and whether scales
    were moved into its weights."""
    floats = {name: file for name, file in written["inputs"].items() if ": " not in name}
    return floats, any("smoothing" in block for block in written.get("blocks", {}).values())


def float_folder(quantized: Path) -> Path | None:
    """The folder of the float checkpoint that a quantized one was made from, if it has that one's name, lies beside it or in the current
    folder, and holds the bytes that the quantized one's manifest names; None too where its weights are others because of smoothing.

    Args:
        quantized: a folder that qlm wrote, or another, of which nothing is known.
    """
    if not (quantized / manifest.NAME).is_file():
        return None
    written = manifest.read(quantized)
    (floats, smoothed), name = _made_from(written), written["recipe"].get("model")
    if smoothed or not floats or not isinstance(name, str) or not is_plain_name(name):
        return None
    for folder in (quantized.parent / name, Path(name)):
        if (folder / "config.json").is_file():
            try:
                files = Checkpoint.open(folder).files()
            except QlmError:
                continue
            # Sizes first: most others differ in them, and bytes take time.
            sizes = all(floats.get(file.name, {}).get("bytes") == file.stat().st_size for file in files)
            if sizes and _first_difference(floats, manifest.input_facts(files)) is None:
                return folder
    return None


def files_on_record(base: str | Path, revision: str | None = None) -> Mapping[str, Mapping[str, Any]]:
    """{name: {"bytes", "sha256"}} of the files that decide what a base computes: as its own manifest has them where it is qlm's and the
    sizes agree, which takes no time; else every byte is hashed."""
    checkpoint = Checkpoint.open(base, revision)
    files = checkpoint.files()
    if checkpoint.path(manifest.NAME) is not None:
        outputs = manifest.read(checkpoint.folder)["outputs"]
        if all(outputs.get(file.name, {}).get("bytes") == file.stat().st_size for file in files):
            return {file.name: outputs[file.name] for file in files}
    return manifest.input_facts(files)


def refuse_other_base(adapter: Adapter, base: Path, files: Mapping[str, Mapping[str, Any]]) -> str:
    """Compare a base with the one that an adapter's manifest names.

    Args:
        files: {name: {"bytes", "sha256"}} of the base's files.
    Returns:
        how the adapter is known to belong to it, in words.
    Raises:
        DataError: it was trained on another base, or on one whose smoothed weights it needs.
    """
    folder = ModelFolder(adapter.folder)
    if folder.path(manifest.NAME) is None:
        return f"the adapter has no {manifest.NAME}: which base it was trained on is not on record"
    written = manifest.read(adapter.folder)
    known = written.get("base", {"files": written.get("inputs", {})})
    different = _first_difference(known["files"], files)
    if different is None:
        return "the adapter was trained on this base"
    if known.get("float_files") and _first_difference(known["float_files"], files) is None:
        if known.get("smoothed"):
            raise DataError(
                f"{adapter.folder}: was trained on int8 weights into which scales of their inputs had been moved, and does not fit "
                f"the float weights in {base}; give the folder that it was trained on"
            )
        return "the adapter was trained on a quantized copy of this base"
    name, recorded = different
    raise DataError(
        f"{adapter.folder}: was trained on another base: {name} in {base} has SHA-256 {files[name]['sha256'][:12]}…, "
        f"{manifest.NAME} says {recorded}; give the base that it was trained on"
    )


def _first_difference(recorded: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> tuple[str, str] | None:
    # Weights first: that they differ says more than that a tokenizer does.
    for name in sorted(files, key=lambda name: (not name.endswith((".safetensors", ".bin")), name)):
        if recorded.get(name) != files[name]:
            return name, f"{recorded[name]['sha256'][:12]}…" if name in recorded else "there was no such file"
    return None
