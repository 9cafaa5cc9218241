"""PyTorch's `.bin` files: what torch.save writes is read bit for bit, and nothing that a pickle asks for is run."""

import collections
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from qlm.checkpoint import unpickle
from qlm.checkpoint.unpickle import ALLOWED_NAMES, read_bin
from qlm.errors import DataError, QlmError
from qlm.formats.dtypes import torch_dtype


def state_dict() -> dict[str, torch.Tensor]:
    shared = torch.arange(12).float()
    return collections.OrderedDict(
        {
            "half": torch.randn(3, 4).half(),
            "bf16": torch.randn(5).bfloat16(),
            "tied.a": shared,
            "tied.b": shared,
            "part": shared[4:8],
            "transposed": shared.reshape(3, 4).T,
            "int8": torch.arange(4, dtype=torch.int8),
            "bool": torch.tensor([True, False]),
            "scalar": torch.tensor(7),
            "empty": torch.ones(0, 3),
            "double": torch.randn(2).double(),
        }
    )


def values(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the file, by its place in it."""
    data = bytearray(path.read_bytes())
    found = {}
    for name, info in read_bin(path).items():
        dtype = torch_dtype(info.dtype)
        count = (len(data) - info.offset) // dtype.itemsize
        raw = data[info.offset : info.offset + count * dtype.itemsize]
        flat = torch.frombuffer(raw, dtype=dtype) if count else torch.empty(0, dtype=dtype)
        stride = info.stride or torch.empty(info.shape, device="meta").stride()
        found[name] = flat.as_strided(info.shape, stride).clone()
    return found


def test_what_torch_writes_is_read(tmp_path):
    path, expected = tmp_path / "model.bin", state_dict()
    torch.save(expected, path)
    found = values(path)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_parameters_and_metadata_are_read(tmp_path):
    path = tmp_path / "model.bin"
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    torch.save(dict(module.named_parameters()), path)
    assert list(read_bin(path)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    torch.save(module.state_dict(), path)  # has the attribute _metadata
    assert torch.equal(values(path)["0.weight"], module[0].weight)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_all_protocols_that_torch_can_write(tmp_path, protocol):
    path = tmp_path / "model.bin"
    torch.save({"a": torch.arange(3)}, path, pickle_protocol=protocol)
    assert values(path)["a"].tolist() == [0, 1, 2]


class Call:
    """Pickles as a call of the named function."""

    def __init__(self, module: str, name: str, *arguments: object) -> None:
        self.text = f"{module}\n{name}\n"
        self.arguments = arguments

    def dump(self) -> bytes:
        arguments = pickle.dumps(self.arguments, protocol=2)[2:-1]
        return b"\x80\x02}X\x01\x00\x00\x00ac" + self.text.encode() + arguments + b"Rs."


def archive(pickled: bytes, members: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, data in (members or {}).items():
            file.writestr(name, data)
    return buffer.getvalue()


FOREIGN = [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("os", "popen"), ("os", "execv"), ("os", "unlink"),
    ("subprocess", "Popen"), ("subprocess", "check_output"), ("builtins", "eval"), ("builtins", "exec"),
    ("builtins", "compile"), ("builtins", "open"), ("builtins", "getattr"), ("builtins", "setattr"),
    ("builtins", "__import__"), ("builtins", "print"), ("builtins", "set"), ("__builtin__", "eval"),
    ("importlib", "import_module"), ("runpy", "run_path"), ("webbrowser", "open"), ("socket", "socket"),
    ("shutil", "rmtree"), ("pathlib", "Path"), ("sys", "exit"), ("pty", "spawn"), ("code", "interact"), ("pdb", "run"),
    ("pip", "main"), ("timeit", "timeit"), ("functools", "partial"), ("functools", "reduce"),
    ("operator", "attrgetter"),
    ("operator", "methodcaller"), ("types", "FunctionType"), ("types", "CodeType"), ("copyreg", "_reconstructor"),
    ("copyreg", "__newobj__"), ("pickle", "loads"), ("_pickle", "Unpickler"), ("marshal", "loads"), ("ctypes", "CDLL"),
    ("numpy", "load"), ("numpy.core.multiarray", "scalar"), ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "dtype"), ("numpy", "ndarray"), ("_codecs", "encode"), ("collections", "defaultdict"),
    ("collections", "Counter"), ("torch", "load"), ("torch.hub", "load"), ("torch.jit", "load"),
    ("torch", "FloatTensor"), ("torch", "Tensor"), ("torch", "device"), ("torch", "Size"),
    ("torch", "ComplexFloatStorage"),
    ("torch.storage", "_load_from_bytes"), ("torch.storage", "UntypedStorage"), ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_sparse_tensor"), ("torch._utils", "_rebuild_qtensor"),
    ("torch._utils", "_rebuild_wrapper_subclass"), ("torch._utils", "_rebuild_parameter_with_state"),
    ("torch._tensor", "_rebuild_from_type_v2"), ("torch.serialization", "_get_layout"),
    ("torch.nn.modules.linear", "Linear"), ("torch._dynamo", "optimize"), ("torch.utils.data", "DataLoader"),
    ("transformers.training_args", "TrainingArguments"), ("collections", "OrderedDict.__init__.__globals__"),
    ("collections OrderedDict", ""), ("torch._utils", "_rebuild_tensor_v2.__globals__"),
]  # fmt: skip


@pytest.mark.parametrize("name", [".".join(pair) for pair in FOREIGN])
def test_foreign_names_are_refused(tmp_path, name):
    module, attribute = next(pair for pair in FOREIGN if ".".join(pair) == name)
    canary = tmp_path / "canary"
    path = tmp_path / "model.bin"
    path.write_bytes(archive(Call(module, attribute, f"touch {canary}").dump()))
    with pytest.raises(DataError) as caught:
        read_bin(path)
    assert "it was not run" in str(caught.value) or "damaged" in str(caught.value)
    assert not canary.exists()


def test_no_foreign_name_is_on_the_list():
    assert len(ALLOWED_NAMES) == 13
    assert not {f"{module} {name}" for module, name in FOREIGN} & ALLOWED_NAMES


@pytest.mark.parametrize(
    "program",
    {
        "inst": b"(S'touch x'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'x'\no.",
        "newobj": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "newobj_ex": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
        "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        "ext1": b"\x82\x01.",
        "ext4": b"\x84\x01\x00\x00\x00.",
        "persid": b"P1\n.",
        "reduce of a string": b"\x80\x02X\x01\x00\x00\x00a)R.",
        "reduce of a storage class": b"\x80\x02ctorch\nFloatStorage\nK\x05\x85R.",
        "ordered dict with arguments": b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
        "build on a dict": b"\x80\x02}}b.",
        "build with attributes": b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00aK\x01sb.",
        "build with slots": b"\x80\x02ccollections\nOrderedDict\n)R}}\x86b.",
        "build on a global": b"\x80\x02ccollections\nOrderedDict\n}b.",
        "int": b"I1\n.",
        "string": b"S'a'\n.",
        "bytes": b"\x80\x03C\x01a.",
        "set": b"\x80\x04\x8f.",
        "long4": b"\x8b\xff\xff\xff\x7f",
        "huge unicode": b"\x80\x02X\xff\xff\xff\x7fa.",
        "huge unicode8": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
        "huge memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "missing memo": b"\x80\x02h\x05.",
        "empty": b"",
        "no stop": b"\x80\x02}",
        "stop at once": b".",
        "empty stack": b"\x80\x02\x85.",
        "mark only": b"(.",
        "mark as a value": b"}((s.",
        "no mark": b"}u.",
        "unhashable key": b"}]Ns.",
        "list at the top": b"].",
        "none at the top": b"N.",
        "append to none": b"NNa.",
        "odd items": b"}(Nu.",
        "twice the same key": b"}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu.",
        "number as a name": b"}K\x01Ns.",
        "not a tensor": b"}X\x01\x00\x00\x00aNs.",
        "storage that is no tuple": b"K\x01Q.",
        "storage of a foreign kind": b"(X\x07\x00\x00\x00storageccollections\nOrderedDict\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
    }.items(),
    ids=lambda item: item[0],
)  # fmt: skip
def test_foreign_programs_are_refused(tmp_path, program):
    path = tmp_path / "model.bin"
    path.write_bytes(archive(program[1]))
    with pytest.raises(DataError):
        read_bin(path)


def test_real_objects_are_refused_and_no_class_is_looked_up(tmp_path):
    """Under an audit hook: neither pickle nor import nor exec is reached."""
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "module.bin")
    torch.save({"a": torch.zeros(2), "arguments": Path("x")}, tmp_path / "arguments.bin")
    (tmp_path / "call.bin").write_bytes(archive(Call("os", "system", f"touch {tmp_path / 'canary'}").dump()))
    write_tensor(tmp_path / "good.zip")
    code = (
        "import sys, zipfile; from pathlib import Path\n"
        "from qlm.checkpoint.unpickle import read_bin; from qlm.errors import DataError\n"
        "(Path(sys.argv[1]) / 'warm.bin').write_bytes(b'x')\n"
        "read_bin(Path(sys.argv[1]) / 'good.zip')  # imports the codecs that zipfile needs\n"
        "events = []\n"
        "watched = {'pickle.find_class', 'import', 'exec', 'compile', 'os.system', 'socket.connect',\n"
        "           'subprocess.Popen'}\n"
        "sys.addaudithook(lambda name, arguments: events.append((name, arguments)) if name in watched else None)\n"
        "for path in sorted(Path(sys.argv[1]).glob('*.bin')):\n"
        "    try: read_bin(path)\n"
        "    except DataError as error: print('refused', path.name)\n"
        "print(events)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        *(f"refused {name}.bin" for name in ("arguments", "call", "module", "warm")),
        "[]",
    ]
    assert not (tmp_path / "canary").exists()


def tensor_program(**changes: object) -> bytes:
    """The pickle of {"a": float tensor [2, 3]} with parts of its description changed."""
    parts = {
        "storage": "FloatStorage",
        "key": "0",
        "elements": 6,
        "offset": 0,
        "shape": (2, 3),
        "stride": (3, 1),
        **changes,
    }

    def dump(value: object) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]

    storage = b"(" + dump("storage") + f"ctorch\n{parts['storage']}\n".encode()
    storage += dump(parts["key"]) + dump("cpu") + dump(parts["elements"]) + b"tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + dump(parts["offset"]) + dump(parts["shape"])
    return b"\x80\x02}" + dump("a") + rebuilt + dump(parts["stride"]) + b"\x89ccollections\nOrderedDict\n)RtRs."


def write_tensor(path: Path, size: int = 24, **changes: object) -> Path:
    path.write_bytes(
        archive(tensor_program(**changes), {"archive/data/0": bytes(range(size)), "archive/version": b"3\n"})
    )
    return path


def test_the_described_tensor_is_accepted_as_it_stands(tmp_path):
    assert read_bin(write_tensor(tmp_path / "model.bin"))["a"].shape == (2, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": 1},
        {"offset": -1},
        {"offset": 1 << 60},
        {"offset": 7, "shape": (0,), "stride": (1,)},
        {"shape": (3, 3)},
        {"shape": (2, -3)},
        {"shape": (1 << 40, 1 << 40), "stride": (0, 0)},
        {"shape": (1000, 3), "stride": (0, 1)},
        {"stride": (4, 1)},
        {"stride": (-3, 1)},
        {"stride": (3,)},
        {"shape": [2, 3]},
        {"shape": (2.0, 3)},
        {"shape": (True, 3)},
        {"shape": (1, 1, 1, 2, 3), "stride": (6, 6, 6, 3, 1)},
        {"elements": 7},
        {"elements": -6},
        {"elements": 5},
        {"elements": "6"},
        {"storage": "DoubleStorage"},
        {"storage": "HalfStorage"},
        {"key": "1"},
        {"key": "../0"},
        {"key": 0},
        {"size": 20},
        {"size": 25},
    ],
    ids=str,
)
def test_tensors_outside_their_storage_are_refused(tmp_path, changes):
    with pytest.raises(DataError):
        read_bin(write_tensor(tmp_path / "model.bin", **changes))


def test_archives_that_torch_would_not_write_are_refused(tmp_path):
    path, good = tmp_path / "model.bin", tensor_program()
    data = {"archive/data/0": bytes(24)}
    cases = {
        "compressed": archive(good, data, zipfile.ZIP_DEFLATED),
        "outside": archive(good, {**data, "../evil": b""}),
        "absolute": archive(good, {**data, "/etc/passwd": b""}),
        "another folder": archive(good, {"other/data/0": bytes(24)}),
        "parent": archive(good, {**data, "archive/data/../../x": b""}),
        "torchscript": archive(good, {**data, "archive/code/__torch__.py": b""}),
        "constants": archive(good, {**data, "archive/constants.pkl": b""}),
        "big endian": archive(good, {**data, "archive/byteorder": b"big"}),
        "no pickle": archive(good, data).replace(b"data.pkl", b"data.pkx"),
        "no storage": archive(good),
        "no zip": pickle.dumps({"a": 1}),
        "truncated": archive(good, data)[:-30],
        "only the start": b"PK\x03\x04",
        "prepended": b"PK\x03\x04" + archive(good, data),
        "empty": b"",
        "big pickle": archive(bytes(unpickle.MAX_PICKLE_BYTES + 1), data),
    }
    # The directory at the end, and each member's own header, hold the name.
    cases["twice"] = archive(good, {**data, "archive/data/1": bytes(24)}).replace(b"archive/data/1", b"archive/data/0")
    # Both members point to the same bytes: the way of a zip bomb without compression.
    overlapping = bytearray(archive(good, {**data, "archive/data/1": bytes(24)}))
    first = overlapping.find(b"archive/data/0") - 30
    entry = overlapping.rfind(b"archive/data/1") - 46
    struct.pack_into("<I", overlapping, entry + 42, first)
    cases["overlap"] = bytes(overlapping)
    for name, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_bin(path)
        assert str(path) in str(caught.value), name


def test_the_format_before_zip_is_refused_with_a_way_out(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match=r"not a zip file.* save it again with a newer torch"):
        read_bin(tmp_path / "model.bin")


def test_mutants_give_an_error_or_tensors_inside_the_file(tmp_path):
    path = tmp_path / "model.bin"
    torch.save(state_dict(), path)
    data = path.read_bytes()
    begin = data.find(b"data.pkl")
    length = 3000
    chance = random.Random(0)
    refused = 0
    for _ in range(700):
        mutant = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            spot = chance.randrange(begin, begin + length) if chance.random() < 0.8 else chance.randrange(len(mutant))
            mutant[spot] = chance.randrange(256)
        if chance.random() < 0.1:
            del mutant[chance.randrange(len(mutant)) :]
        path.write_bytes(mutant)
        try:
            found = read_bin(path)
        except QlmError:
            refused += 1
        else:
            for info in found.values():
                assert 0 <= info.offset <= os.path.getsize(path)
    assert refused > 150
