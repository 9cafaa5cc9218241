"""The tensors that a config implies against those that the files hold, for every reader of checkpoints: names as
published or without the base model's prefix, heads that are tied or stored, buffers of older files.
"""

from collections.abc import Collection, Iterable, Mapping

from qlm.arch import FamilySpec, Task
from qlm.checkpoint.names import check_tensors
from qlm.checkpoint.reader import Checkpoint
from qlm.errors import DataError
from qlm.formats.layout import TensorLayout


def published_name(spec: FamilySpec, name: str, task: Task = "causal-lm") -> str:
    """A tensor's name in published files, from its name in transformers' class for the task."""
    head = f"{spec.head}."
    if task == "causal-lm" and name.startswith(head):
        return f"{spec.published_head}.{name.removeprefix(head)}"
    return f"{spec.prefix}.{name}" if task == "base" else name


def is_base_only(checkpoint: Checkpoint, spec: FamilySpec) -> bool:
    """Whether the files hold the base model alone, whose names lack its prefix."""
    return not any(name.startswith(f"{spec.prefix}.") for name in checkpoint.tensors)


def embedding_dtype(checkpoint: Checkpoint, spec: FamilySpec) -> str:
    """Safetensors name of the token embedding's dtype; F32 where there is none."""
    embedding = f"{spec.embedding}.weight"
    name = embedding if is_base_only(checkpoint, spec) else f"{spec.prefix}.{embedding}"
    return checkpoint.tensors[name].dtype if name in checkpoint.tensors else "F32"


def match_tensors(
    checkpoint: Checkpoint,
    spec: FamilySpec,
    expected: Mapping[str, TensorLayout],
    *,
    optional: Collection[str] = (),
    ignored: Iterable[str] = (),
) -> dict[str, str]:
    """Published name of each expected tensor to its name in the files, after checking that these hold exactly what is
    expected.

    Args:
        expected: by published names.
        optional: those of them that may be absent; they get a name all the same.
        ignored: regular expressions (full match) of names that may be there besides, and are not used.

    Raises:
        DataError: naming the first tensors that are missing, left over, or of a wrong shape or dtype.
    """
    base_only = is_base_only(checkpoint, spec)

    def in_files(name: str) -> str:
        published = f"{spec.published_head}."
        if name.startswith(published):
            # GPTQModel writes GPT-NeoX's head under its name in memory.
            other = f"{spec.head}.{name.removeprefix(published)}"
            return other if name not in checkpoint.tensors and other in checkpoint.tensors else name
        return name.removeprefix(f"{spec.prefix}.") if base_only else name

    file_names = {name: in_files(name) for name in expected}
    wanted = {
        file_names[name]: (layout.shape, layout.dtypes)
        for name, layout in expected.items()
        if name not in optional or file_names[name] in checkpoint.tensors
    }
    prefix = "" if base_only else rf"{spec.prefix}\."
    check_tensors(checkpoint, wanted, [*(prefix + pattern for pattern in spec.ignored_tensors), *ignored])
    return file_names


def check_tied_head(checkpoint: Checkpoint, head: str, embedding: str) -> None:
    """Some files repeat the tied head. If the copies differ, either reading is wrong for somebody.

    Args:
        head, embedding: names in the files; the head need not be there.
    """
    if head in checkpoint.tensors and not checkpoint.same_values(head, embedding):
        raise DataError(
            f"{head}: differs from {embedding}, but config.json ties them (tie_word_embeddings); set it to false if "
            "the head is its own matrix"
        )
