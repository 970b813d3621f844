"""Files made to run code, to read elsewhere, or to fill memory and time: what each reader must refuse.

Every function returns the bytes of a file, or makes a folder; a file that holds code would make `CANARY`.
"""

import gzip
import io
import json
import os
import pickle
import struct
import zipfile

import torch

from mgt_fast.checkpoint import CheckpointMeta, _digest
from mgt_fast.config import MGTConfig
from mgt_fast.model import MGT

CANARY = "canary"
GIGABYTES = 3 * 2**30  # what a bomb that goes off would take


class Bomb:
    """Makes the canary's file when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


def _text(value):
    """Opcodes that push a text."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _archive(pickled, storages=(), **options):
    """Return the bytes of an archive such as torch.save writes, around any pickle."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", **options) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for key, data in enumerate(storages):
            archive.writestr(f"archive/data/{key}", data)
    return content.getvalue()


def _call(name, *arguments):
    """Return the pickle of a state_dict with one entry: what a function returns."""
    return b"\x80\x02}" + _text("weight") + b"c" + name.encode() + b"\n(" + b"".join(arguments) + b"tRs."


def _tensor(nbytes, shape, stride):
    """Return the pickle of a state_dict with one tensor of the storage 0."""
    push = lambda number: b"\x8a\x08" + struct.pack("<q", number)  # noqa: E731
    dims = lambda numbers: b"(" + b"".join(map(push, numbers)) + b"t"  # noqa: E731
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu")
    storage += push(nbytes // 4) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    return _call(
        "torch._utils\n_rebuild_tensor_v2", storage, push(0), dims(shape), dims(stride), b"\x89", hooks
    )


def _torch_save(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def _overlapping():
    """An archive whose directory lists one entry a thousand times under other names."""
    data = _archive(b"\x80\x02}.", [bytes(2**22)])
    start = struct.unpack("<I", data[-6:-2])[0]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        offset = archive.getinfo("archive/data/0").header_offset
    directory, count = data[start:-22], 1000
    last = directory[directory.rindex(b"PK\x01\x02") :]
    assert struct.unpack("<I", last[42:46])[0] == offset
    for key in range(1, count + 1):
        name = f"archive/data/{key}".encode()
        directory += last[:28] + struct.pack("<H", len(name)) + last[30:46] + name
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 4 + count, 4 + count, len(directory), start, 0)
    return data[:start] + directory + end


def _twins():
    """A tuple that holds the same tuple twice, sixty times over: 2^60 objects to hash."""
    key = b"K\x01\x85"
    for i in range(60):
        key += bytes([ord("q"), i, ord("0"), ord("h"), i, ord("h"), i]) + b"\x86"
    return key


def _safetensors(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _weights(**change):
    return {"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **change}}


def _checkpoint(change=lambda meta: None, extra=(), text=None):
    """Return a checkpoint with correct digests whose metadata was changed."""
    from safetensors.torch import save

    torch.manual_seed(0)
    config = MGTConfig(channels=2, num_scalars=2, num_vectors=1, num_blocks=1, expert_hidden=2)
    state = {**MGT(config).state_dict(), **{name: torch.zeros(2) for name in extra}}
    meta = json.loads(json.dumps(CheckpointMeta(model=config).__dict__ | {"model": config.__dict__}))
    change(meta)
    text = json.dumps({"meta": meta, "sha256": _digest(state, meta)}) if text is None else text
    return save(state, metadata={"format": "pt", "mgt_fast": text})


def _set(**values):
    return lambda meta: meta.update(values)


def _set_model(**values):
    return lambda meta: meta["model"].update(values)


_DEEP = 20_000

CHECKPOINTS = {
    # Code.
    "pickle.safetensors": lambda: pickle.dumps(Bomb()),
    "pickle.pt": lambda: pickle.dumps({"weight": Bomb()}, protocol=0),
    "protocol-5.pt": lambda: pickle.dumps({"weight": Bomb()}, protocol=5),
    "saved.pt": lambda: _torch_save({"state_dict": {"weight": torch.zeros(2)}, "hook": Bomb()}),
    "saved.safetensors": lambda: _torch_save({"weight": Bomb()}),
    "legacy.pt": lambda: _torch_save({"weight": Bomb()}, _use_new_zipfile_serialization=False),
    "stack-global.pt": lambda: _archive(pickle.dumps({"weight": Bomb()}, protocol=4)),
    "instance.pt": lambda: _archive(
        b"\x80\x02}" + _text("w") + b"(" + _text(f"touch {CANARY}") + b"ios\nsystem\ns."
    ),
    "extension.pt": lambda: _archive(b"\x80\x02\x82\x01."),
    "eval.pt": lambda: _archive(_call("builtins\neval", _text(f"__import__('os').system('touch {CANARY}')"))),
    "nested.pt": lambda: _archive(
        _call("torch.storage\n_load_from_bytes", b"B" + _sized(_torch_save(Bomb())))
    ),
    "load.pt": lambda: _archive(_call("torch.serialization\nload", _text("elsewhere.pt"))),
    "getattr.pt": lambda: _archive(_call("builtins\ngetattr", b"cos\nsystem\n", _text("__call__"))),
    # Memory and time.
    "deflated.pt": lambda: _archive(
        b"\x80\x02X" + struct.pack("<I", 2**27) + bytes(2**27) + b".", compression=zipfile.ZIP_DEFLATED
    ),
    "overlapping.pt": _overlapping,
    "bytearray.pt": lambda: _archive(
        _call("builtins\nbytearray", b"\x8a\x05" + GIGABYTES.to_bytes(5, "little"))
    ),
    "twins.pt": lambda: _archive(b"\x80\x02}" + _twins() + b"K\x01s."),
    "memo.pt": lambda: _archive(b"\x80\x02}r\xff\xff\xff\x0f."),
    "deep.pt": lambda: _archive(b"\x80\x02" + b"]" * _DEEP + b"a" * (_DEEP - 1) + b"."),
    "short-storage.pt": lambda: _archive(_tensor(2**30, [2**28], [1]), [bytes(8)]),
    "expanded.pt": lambda: _archive(_tensor(4, [2**30], [0]), [bytes(4)]),
    "negative-stride.pt": lambda: _archive(_tensor(8, [2], [-1]), [bytes(8)]),
    # Headers that lie.
    "endless-header.safetensors": lambda: _safetensors(b"{}", length=2**63),
    "long-header.safetensors": lambda: _safetensors(b"{}", length=10**6),
    "overlapping.safetensors": lambda: _safetensors({**_weights(), "b": _weights()["weight"]}, bytes(8)),
    "negative.safetensors": lambda: _safetensors(_weights(data_offsets=[-8, 0]), bytes(8)),
    "backwards.safetensors": lambda: _safetensors(_weights(data_offsets=[8, 0]), bytes(8)),
    "beyond.safetensors": lambda: _safetensors(_weights(data_offsets=[0, 2**40], shape=[2**38]), bytes(8)),
    "overflow.safetensors": lambda: _safetensors(_weights(shape=[2**32, 2**32]), bytes(8)),
    "deep-header.safetensors": lambda: _safetensors(b'{"a":' * _DEEP + b"1" + b"}" * _DEEP),
    "unknown-type.safetensors": lambda: _safetensors(_weights(dtype="os.system"), bytes(8)),
    "outside.safetensors": lambda: _safetensors({"../../elsewhere": _weights()["weight"]}, bytes(8)),
    # Whole checkpoints with right digests.
    "names-outside.safetensors": lambda: _checkpoint(extra=["../../elsewhere"]),
    "deep-metadata.safetensors": lambda: _checkpoint(text='{"meta":' + "[" * _DEEP),
    "list-metadata.safetensors": lambda: _checkpoint(text="[]"),
    "nan.safetensors": lambda: _checkpoint(_set(target_std=float("nan"))),
    "infinite.safetensors": lambda: _checkpoint(_set(target_mean=float("inf"))),
    "text-scaling.safetensors": lambda: _checkpoint(_set(target_std="1")),
    "neighbours.safetensors": lambda: _checkpoint(_set(max_neighbors="25")),
    "class.safetensors": lambda: _checkpoint(_set(model={"__class__": "os.system"})),
    "target.safetensors": lambda: _checkpoint(_set(_target_="os.system")),
    "wide.safetensors": lambda: _checkpoint(_set_model(channels=20_000)),
    "overflowing.safetensors": lambda: _checkpoint(_set_model(channels=2**62)),
    "tall.safetensors": lambda: _checkpoint(_set_model(num_blocks=10**9)),
    "fraction.safetensors": lambda: _checkpoint(_set_model(channels=2.5)),
    "nan-dropout.safetensors": lambda: _checkpoint(_set_model(dropout=float("nan"))),
}


def _sized(data):
    return struct.pack("<I", len(data)) + data


def _merges():
    """YAML whose merge keys multiply: 10^9 pairs."""
    lines = ["a0: &a0 {seed: 1}"]
    for i in range(9):
        lines.append(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 10)}]}}")
    return "\n".join(lines)


def _aliases(key):
    """YAML whose lists multiply: 10^9 items."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for i in range(9):
        lines.append(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]")
    return "\n".join([*lines, f"{key}: *a9"])


CONFIGS = {
    "apply.yaml": lambda: f"seed: !!python/object/apply:os.system ['touch {CANARY}']",
    "new.yaml": lambda: f"seed: !!python/object/new:os.system ['touch {CANARY}']",
    "eval.yaml": lambda: (
        f"""seed: !!python/object/apply:eval ["__import__('os').system('touch {CANARY}')"]"""
    ),
    "name.yaml": lambda: "device: !!python/name:os.system",
    "module.yaml": lambda: "device: !!python/module:antigravity",
    "key.yaml": lambda: f"? !!python/object/apply:os.system ['touch {CANARY}']\n: 1",
    "class.yaml": lambda: "optim: {class: torch.optim.SGD}",
    "hydra.yaml": lambda: f"model: {{_target_: os.system, command: touch {CANARY}}}",
    "backend.yaml": lambda: "backend: os.system",
    "section.yaml": lambda: "optim: torch.optim.SGD",
    "merges.yaml": _merges,
    "aliases.yaml": lambda: _aliases("data"),
    "aliases-in-a-list.yaml": lambda: "data: {train: &t [val]}\n" + _aliases("model"),
    "deep.yaml": lambda: "[" * 5000,
    "deep-mapping.yaml": lambda: "{a: " * 5000,
    "many-keys.yaml": lambda: "".join(f"k{i}: 1\n" for i in range(5000)),
    "endless-number.yaml": lambda: "seed: " + "9" * 10_000,
    "nan.yaml": lambda: "optim: {lr: .nan}",
    "bytes.yaml": lambda: b"seed: \xff\xfe",
    "binary.yaml": lambda: "seed: !!binary 'AAAA'",
}


def _manifest(**change):
    shard = {"file": "shard-00000.arrow", "sha256": "0" * 64, "crystals": 1, "atoms": 1}
    shard |= {key: value for key, value in change.items() if key in shard}
    content = {"format": "mgt-fast dataset", "version": 1, "targets": {}, "crystals": 1, "atoms": 1}
    return json.dumps({**content, "shards": [shard], **{k: v for k, v in change.items() if k not in shard}})


MANIFESTS = {
    "outside": lambda: _manifest(file="../elsewhere"),
    "absolute": lambda: _manifest(file="/dev/zero"),
    "nul": lambda: _manifest(file="shard\0.arrow"),
    "itself": lambda: _manifest(file="."),
    "class": lambda: _manifest(targets={"gap": {"__class__": "os.system"}}),
    "endless": lambda: _manifest(shards=[], crystals=10**30),
    "nan": lambda: _manifest(crystals=float("nan")),
    "deep": lambda: "[" * _DEEP,
    "list": lambda: "[]",
}

PICKLES = {
    "code.pkl": lambda: pickle.dumps([("a", Bomb())], protocol=0),
    "code-5.pkl": lambda: pickle.dumps([("a", Bomb())], protocol=5),
    "memo.pkl": lambda: b"\x80\x02]r\xff\xff\xff\x0f.",
    "twins.pkl": lambda: b"\x80\x02]}" + _twins() + b"K\x01sa.",
    "persistent.pkl": lambda: b"\x80\x02" + _text("elsewhere") + b"Q.",
    "long-text.pkl": lambda: b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
    "bomb.pkl.gz": lambda: gzip.compress(b"\x80\x02X" + struct.pack("<I", 2**27) + bytes(2**27) + b"."),
}
