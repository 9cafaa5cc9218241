"""The CPU kernels' shared library, called through ctypes: where it is, what its functions take, what its errors mean.

Nothing is loaded at import; the first `library()` does it. The library is built when qlm is installed (CMakeLists.txt);
an installation without it (`QLM_NATIVE=0`) has `available() == False`, and `library()` says so.

Environment, read once, when the library is loaded:
    QLM_ISA: the instruction set to use, one of "scalar", "avx2", "avxvnni", "avx512vnni"; an error if it cannot be had.
    QLM_LIBRARY: path of a libqlm_cpu.so to use instead of the installed one, for work on the kernels.

The structures mirror abi.h field by field; pointers are plain addresses (`int` or None), and what they point to must
outlive the structure. Functions that can fail raise by themselves; nobody has to look at a status.
"""

import ctypes
import os
import sys
import threading
import weakref
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from qlm.errors import DataError, MissingInput, QlmError, Unavailable, UsageError

ABI_VERSION: Final = 3
LIBRARY: Final = "libqlm_cpu.so"
MOST_THREADS: Final = 256

# qlm_dtype, qlm_format, qlm_activation, qlm_qkv of abi.h.
F32, F16, BF16, I8 = range(4)
FLOAT, INT8, GPTQ, NF4 = range(4)
NONE, RELU, GELU, GELU_TANH = range(4)
QKV_SEPARATE, QKV_PER_HEAD, QKV_MULTI_QUERY = range(3)
# Out features in a strip where GPTQ words are arranged (`qlm_gptq_arrange`): the least that abi.h allows.
GPTQ_STRIP: Final = 128

# qlm_status of abi.h: who must act.
OK: Final = 0
ERRORS: Final[dict[int, type[QlmError]]] = {
    1: UsageError,  # QLM_BAD_ARGUMENT
    2: Unavailable,  # QLM_NO_MEMORY
    3: DataError,  # QLM_FILE_SHRANK
    4: DataError,  # QLM_NOT_FINITE
}


class Linear(Structure):
    """`qlm_linear`: y = x W^T + bias."""

    _fields_ = [
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("format", c_int32),
        ("bits", c_int32),
        ("weight", c_void_p),
        ("weight_dtype", c_int32),
        ("scale_dtype", c_int32),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("row_sum", c_void_p),
        ("symmetric_input", c_int32),
        ("strip", c_int32),
        ("group_size", c_int64),
        ("zero_point", c_void_p),
        ("order", c_void_p),
        ("block", c_int64),
        ("absmax_code", c_void_p),
        ("nested_code", c_void_p),
        ("nested_absmax", c_void_p),
        ("nested_block", c_int64),
        ("nested_offset", c_float),
        ("rank", c_int32),
        ("adapter_a", c_void_p),
        ("adapter_b", c_void_p),
    ]


class Norm(Structure):
    """`qlm_norm`: LayerNorm."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class Block(Structure):
    """`qlm_block`: one transformer block."""

    _fields_ = [
        ("attention_norm", Norm),
        ("mlp_norm", Norm),
        ("qkv", Linear * 3),
        ("attention_out", Linear),
        ("up", Linear),
        ("down", Linear),
    ]


class Model(Structure):
    """`qlm_model`: everything that a decoder needs to know."""

    _fields_ = [
        ("vocabulary", c_int64),
        ("positions", c_int64),
        ("embedding_width", c_int64),
        ("hidden", c_int64),
        ("mlp", c_int64),
        ("layers", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("rotary_dims", c_int64),
        ("rotary_base", c_float),
        ("norm_eps", c_float),
        ("attention_scale", c_float),
        ("qkv_layout", c_int32),
        ("activation", c_int32),
        ("norm_before", c_int32),
        ("parallel_residual", c_int32),
        ("has_final_norm", c_int32),
        ("embedding_dtype", c_int32),
        ("position_dtype", c_int32),
        ("embedding", c_void_p),
        ("position", c_void_p),
        ("position_offset", c_int64),
        ("project_in", POINTER(Linear)),
        ("project_out", POINTER(Linear)),
        ("final_norm", Norm),
        ("head", Linear),
        ("blocks", POINTER(Block)),
    ]


STRUCTURES: Final[dict[str, type[Structure]]] = {
    "qlm_linear": Linear,
    "qlm_norm": Norm,
    "qlm_block": Block,
    "qlm_model": Model,
}

# Every function of abi.h: what it returns, what it takes. `STATUS` is an int that is 0 or becomes an exception.
STATUS: Final = object()
_handle = c_void_p  # qlm_team *, qlm_decoder *, qlm_cache *
_out = POINTER(c_void_p)
FUNCTIONS: Final[dict[str, tuple[Any, list[Any]]]] = {
    "qlm_error": (c_char_p, []),
    "qlm_abi_version": (c_int32, []),
    "qlm_struct_size": (c_int64, [c_char_p]),
    "qlm_isa_compiled": (c_char_p, []),
    "qlm_isa_supported": (c_char_p, []),
    "qlm_isa_select": (STATUS, [c_char_p]),
    "qlm_isa_selected": (c_char_p, []),
    "qlm_team_create": (STATUS, [c_int32, _out]),
    "qlm_team_borrow": (STATUS, [c_void_p, c_int32, _out]),
    "qlm_team_destroy": (None, [_handle]),
    "qlm_team_threads": (c_int32, [_handle]),
    "qlm_linear_check": (STATUS, [POINTER(Linear)]),
    "qlm_linear_forward": (STATUS, [_handle, POINTER(Linear), c_int64, c_void_p, c_int64, c_void_p, c_int64]),
    "qlm_int8_row_sums": (STATUS, [_handle, c_void_p, c_int64, c_int64, c_void_p]),
    "qlm_int8_quantize_rows": (STATUS, [_handle, c_void_p, c_int32, c_int64, c_int64, c_void_p, c_void_p, c_void_p]),
    "qlm_gptq_arrange": (STATUS, [_handle, c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int32, c_void_p]),
    "qlm_gram_bf16": (STATUS, [_handle, c_void_p, c_int64, c_int64, c_void_p]),
    "qlm_gram_bf16_runs_here": (c_int32, []),
    "qlm_read_bandwidth": (STATUS, [_handle, c_void_p, c_int64, POINTER(c_double)]),
    "qlm_decoder_create": (STATUS, [POINTER(Model), _handle, c_int32, _out]),
    "qlm_decoder_destroy": (None, [_handle]),
    "qlm_cache_create": (STATUS, [_handle, _out]),
    "qlm_cache_fork": (STATUS, [_handle, _out]),
    "qlm_cache_truncate": (STATUS, [_handle, c_int64]),
    "qlm_cache_length": (c_int64, [_handle]),
    "qlm_cache_destroy": (None, [_handle]),
    "qlm_cache_bytes": (c_int64, [_handle]),
    "qlm_decoder_step": (STATUS, [_handle, c_int64, c_void_p, c_void_p, c_void_p, c_void_p]),
    "qlm_decoder_score": (STATUS, [_handle, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p]),
    "qlm_mapping_register": (STATUS, [c_void_p, c_int64]),
    "qlm_mapping_unregister": (None, [c_void_p]),
    "qlm_mapping_check": (STATUS, [c_void_p]),
}


class Native:
    """The loaded library: `native.qlm_linear_forward(...)` and every other function of abi.h, by name.

    Attributes:
        path: the file.
        compiled: the instruction sets in it, best last; supported: those that this machine can run.
    """

    path: Path
    compiled: tuple[str, ...]
    supported: tuple[str, ...]

    def __init__(self, path: Path) -> None:
        """
        Raises:
            Unavailable: the file cannot be loaded here, or is not of this version of qlm.
        """
        again = "install qlm again (pip install -e . in a clone)"
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise Unavailable(f"{path}: cannot be loaded ({error}); {again}") from None
        self.path = path
        try:
            for name, (returns, takes) in FUNCTIONS.items():
                function = self._library[name]
                function.argtypes = takes
                function.restype = c_int if returns is STATUS else returns
                if returns is STATUS:
                    function.errcheck = self._raise
                setattr(self, name, function)
        except AttributeError as error:
            raise Unavailable(f"{path}: not the library of this version of qlm ({error}); {again}") from None
        version = self.qlm_abi_version()
        sizes = {name: self.qlm_struct_size(name.encode()) for name in STRUCTURES}
        expected = {name: ctypes.sizeof(structure) for name, structure in STRUCTURES.items()}
        if (version, sizes) != (ABI_VERSION, expected):
            raise Unavailable(
                f"{path}: version {version} with structures of {sizes} bytes, "
                f"but this qlm has version {ABI_VERSION} and {expected}; {again}"
            )
        self.compiled = tuple(self.qlm_isa_compiled().decode().split(","))
        self.supported = tuple(self.qlm_isa_supported().decode().split(","))

    def __getattr__(self, name: str) -> Any:
        """The functions of `FUNCTIONS` are set by name; this is for what is not there, and for type checkers."""
        raise AttributeError(f"{name}: not a function of abi.h")

    def error(self) -> str:
        """The line that belongs to the last failure on this thread."""
        return str(self.qlm_error().decode(errors="replace"))

    def check(self, status: int) -> None:
        """Raise the error that a status means; functions that return a status have done so already."""
        if status != OK:
            raise ERRORS.get(status, QlmError)(self.error() or f"the CPU kernels failed with status {status}")

    def _raise(self, status: Any, function: Any, arguments: Any) -> Any:
        self.check(status)
        return status

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return str(self.qlm_isa_selected().decode())

    def select_isa(self, name: str | None) -> None:
        """Use the instruction set `name`, or the best with None, from the next call on; not while a call runs.

        Raises:
            UsageError: no such name. Unavailable: it is not in this library, or this machine cannot run it.
        """
        if name is not None and name not in self.supported:
            known = ("scalar", "avx2", "avxvnni", "avx512vnni")
            if name not in known:
                raise UsageError(f"instruction set {name!r}: expected one of {', '.join(known)}")
            why = "this machine cannot run it" if name in self.compiled else f"not compiled into {self.path}"
            raise Unavailable(f"instruction set {name!r}: {why}; there are {', '.join(self.supported)}")
        self.qlm_isa_select(None if name is None else name.encode())


def _candidates() -> list[Path]:
    """Where the library may be. An editable installation has the sources in one folder and what was built in another,
    and both are in `__path__`."""
    chosen = os.environ.get("QLM_LIBRARY")
    return [Path(chosen)] if chosen else [Path(folder) / LIBRARY for folder in __path__]


def available() -> bool:
    """Whether the library was built (or QLM_LIBRARY names one). What is there but does not work is an error later."""
    return bool(os.environ.get("QLM_LIBRARY")) or any(path.is_file() for path in _candidates())


def why_not_available() -> str:
    """One line; empty if it is available."""
    if available():
        return ""
    folders = ", ".join(str(path.parent) for path in _candidates())
    return (
        f"qlm's CPU kernels are not installed (no {LIBRARY} in {folders}); "
        "install qlm again, with a C++ compiler and without QLM_NATIVE=0"
    )


_native: Native | None = None
_lock = threading.Lock()


def library() -> Native:
    """The library, loaded by the first call.

    Raises:
        Unavailable: it was not built, does not fit this version of qlm, or QLM_ISA cannot be had.
        MissingInput: QLM_LIBRARY names no file. UsageError: QLM_ISA is no instruction set.
    """
    global _native
    if _native is None:
        with _lock:
            if _native is None:
                _native = _load()
    return _native


def _load() -> Native:
    found = [path for path in _candidates() if path.is_file()]
    if not found:
        if os.environ.get("QLM_LIBRARY"):
            raise MissingInput(
                f"QLM_LIBRARY={os.environ['QLM_LIBRARY']}: no such file; unset it to use the installed one"
            )
        raise Unavailable(why_not_available())
    native = Native(found[0].resolve())
    isa = os.environ.get("QLM_ISA")
    if isa:
        try:
            native.select_isa(isa)
        except QlmError as error:
            raise type(error)(f"QLM_ISA: {error}") from None
    return native


# Threads -------------------------------------------------------------------------------------------------------------


def _cgroup_cpus() -> float:
    """CPUs' worth of time that the control groups of this process allow, infinite where they set no limit: version 2's
    cpu.max and version 1's cpu.cfs_quota_us, of its own group and of those above it (cgroups(7))."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return float("inf")
    most = float("inf")
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") / controllers
        own = root / group.lstrip("/")
        for folder in (own, *own.parents):
            if folder == root.parent:
                break
            try:
                if controllers:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
            except (OSError, ValueError):
                continue  # in a container, the host's path is not there, and the group's files are in the root
            if quota.strip() not in ("max", "-1"):
                most = min(most, float(quota) / float(period))
    return most


def default_threads() -> int:
    """The CPUs that this process may use: its affinity, and its control group's quota rounded down; 1 at least."""
    return max(1, int(min(len(os.sched_getaffinity(0)), _cgroup_cpus(), MOST_THREADS)))


class Team:
    """A team of threads for the kernels. Closed by `close()`, at the end of a `with`, or when nobody has it any more.

    Attributes:
        handle: the `qlm_team *`, to pass to functions of abi.h. threads: how many, the calling one counted.
        borrowed: whether they are the OpenMP runtime's; such a team is for `qlm_linear_forward` only.
    """

    def __init__(self, threads: int | None = None, *, gomp_parallel: int | None = None) -> None:
        """`threads`: 1 to 256, `default_threads()` by default; `gomp_parallel`: GOMP_parallel's address, to borrow them.

        Raises:
            UsageError: an impossible number. Unavailable: no library, or no more threads to be had.
        """
        native = library()
        threads = default_threads() if threads is None else threads
        if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MOST_THREADS:
            raise UsageError(f"threads: {threads!r}, expected a whole number from 1 to {MOST_THREADS}")
        handle = c_void_p()
        if gomp_parallel is None:
            native.qlm_team_create(threads, ctypes.byref(handle))
        else:
            native.qlm_team_borrow(gomp_parallel, threads, ctypes.byref(handle))
        self._handle = handle.value
        self.threads = threads
        self.borrowed = gomp_parallel is not None
        self._finalizer = weakref.finalize(self, native.qlm_team_destroy, handle)

    @property
    def handle(self) -> int:
        if not self._finalizer.alive or self._handle is None:
            raise UsageError("this team of threads is closed; make another")
        return self._handle

    def close(self) -> None:
        """Join the threads. Nothing may be running on them, nor use them later."""
        self._finalizer()

    def __enter__(self) -> "Team":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _OpenMP:
    """The OpenMP runtime that torch has loaded: GNU's, or LLVM's or Intel's, which have GNU's entry points too."""

    NAMES = ("libgomp", "libomp", "libiomp5")

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        self.parallel = ctypes.cast(library["GOMP_parallel"], c_void_p).value
        # An int for the calling thread, which torch.set_num_threads sets.
        self.most_threads = library["omp_get_max_threads"]

    @classmethod
    def loaded(cls) -> "_OpenMP | None":
        """The one in this process, torch's if there are several; None without one."""
        try:
            lines = Path("/proc/self/maps").read_text().splitlines()
        except OSError:
            return None
        paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
        found = [path for path in paths if os.path.basename(path).split("-")[0].split(".")[0] in cls.NAMES]
        for path in sorted(found, key=lambda path: ("/torch" not in path, path)):
            try:
                return cls(path)
            except (OSError, AttributeError):
                continue
        return None


_openmp: _OpenMP | None = None
_looked_for_openmp = False
_shared_teams: dict[tuple[int | None, int], Team] = {}
_lock_teams = threading.Lock()


def borrowed_team() -> Team:
    """A team on the threads that torch computes with, so that two pools do not fight for the CPUs: as many as torch has
    set for the calling thread (`torch.set_num_threads`). Without an OpenMP runtime in the process (torch is not imported,
    or built another way), a team of `default_threads()` that is shared by all who call this. Not to be closed.

    Raises:
        Unavailable: no library.
    """
    global _openmp, _looked_for_openmp
    with _lock_teams:
        if not _looked_for_openmp:
            _openmp = _OpenMP.loaded()
            _looked_for_openmp = "torch" in sys.modules  # else again next time: it may be imported later
        parallel = None if _openmp is None else _openmp.parallel
        threads = default_threads() if _openmp is None else max(1, min(_openmp.most_threads(), MOST_THREADS))
        key = (parallel, threads)
        if key not in _shared_teams:
            _shared_teams[key] = Team(threads, gomp_parallel=parallel)
        return _shared_teams[key]
