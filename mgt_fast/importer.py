"""Read checkpoints of the published MGT program: its parameter names, its sizes, its .pt files."""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from mgt_fast.config import MGTConfig

# Parameters that the published program creates and never uses.
UNUSED_MODULES = ("lemb", "lin_edge_len")
WRAPPERS = ("state_dict", "model_state_dict", "model")
ATOM_FEATURES = 92  # length of a CGCNN element vector
# What the pickle of a state_dict names; nothing among it allocates memory by its arguments.
_NAMES = re.compile(
    r"collections OrderedDict|torch (\w+Storage|Size|device|\w*\d+)"
    r"|torch\._utils _rebuild_(tensor_v2|parameter)"
)
_LARGEST_TUPLE = 10_000  # the arguments that rebuild a tensor are some twenty objects
# What zipfile, pickletools and torch raise upon damaged files.
_DAMAGES = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, EOFError, LookupError, TypeError, AttributeError),
    *(RuntimeError, ValueError, ArithmeticError),
)

State = dict[str, torch.Tensor]


def load_published_checkpoint(path: str | Path) -> State:
    """Read the state_dict of a published .pt file, without running any code it may contain.

    The state may lie bare in the file or under "state_dict", "model_state_dict" or "model", and its names
    may carry the "module." of DistributedDataParallel. Reading takes no more memory than the file's size.

    Raises:
        ValueError: if the file is damaged or of another kind, holds Python objects beside tensors, or no
            state_dict.
    """
    path = Path(path)
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGES as error:
        raise ValueError(
            f"{path} is damaged, or no file of plain tensors as torch.save writes it. Loading other Python "
            "objects could run code from it; where you trust it, load it yourself and save it again with "
            f"torch.save(model.state_dict(), path). {type(error).__name__}: {error}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state_dict")
    state = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), content)
    others = [
        f"{name} ({type(value).__name__})" for name, value in state.items() if not torch.is_tensor(value)
    ]
    if others or not state or not all(isinstance(name, str) for name in state):
        raise ValueError(
            f"{path} holds no state_dict, neither bare nor under {', '.join(WRAPPERS)}; "
            f"beside tensors it has: {', '.join(others)[:500] or 'nothing at all'}"
        )
    size, largest = sum(value.nbytes for value in state.values()), path.stat().st_size
    if size > largest:  # views that repeat the numbers of a small one
        raise ValueError(f"{path} has {largest} bytes, but its tensors claim {size}")
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def _check_archive(path: Path) -> None:
    """Refuse a file that is no plain archive of torch.save, before torch unpacks anything of it."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its archive is compressed")
        if len(set(names)) < len(names) or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its archive holds an entry twice")
        for name in names:
            if name.endswith(".pkl"):
                _check_pickle(archive.read(name))


def _check_pickle(pickled: bytes) -> None:
    """Refuse a pickle that names anything but the parts of tensors, or twins of twins of tuples.

    A dictionary whose key nests the same tuple again and again would take for ever.
    """
    sizes: list = []  # of the objects on the stack: the objects in a tuple, however often; 1 for all others
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(pickled):
        name, before = opcode.name, opcode.stack_before
        if name in ("GLOBAL", "INST") and not _NAMES.fullmatch(argument):
            raise ValueError(f"it names {argument.replace(' ', '.'):.100}")
        if name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "DUP"):
            raise ValueError(f"it uses {name}, which torch.save does not")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = sizes[-1]
            continue
        taken = []
        if pickletools.markobject in before:
            while (size := sizes.pop()) is not pickletools.markobject:
                taken.append(size)
            before = before[: before.index(pickletools.markobject)]
        taken += [sizes.pop() for _ in before]
        if name == "MARK":
            sizes.append(pickletools.markobject)
        elif opcode.stack_after:
            size = 1 + sum(taken) if "TUPLE" in name else 1
            size = memo[argument] if name in ("GET", "BINGET", "LONG_BINGET") else size
            if size > _LARGEST_TUPLE:
                raise ValueError(f"a tuple in it holds more than {_LARGEST_TUPLE} objects")
            sizes += [size] * len(opcode.stack_after)


def published_state_dict(state: Mapping[str, torch.Tensor]) -> tuple[State, list[str]]:
    """Drop the parameters that the published program never uses.

    Returns:
        The state_dict that `MGT` and `ReferenceMGT` load strictly, and the names left out.
    """
    ignored = [name for name in state if set(UNUSED_MODULES) & set(name.split("."))]
    return {name: value for name, value in state.items() if name not in set(ignored)}, ignored


def config_from_state_dict(state: Mapping[str, torch.Tensor]) -> MGTConfig:
    """Read the task and every size from the names and shapes of a published state_dict.

    Dropout has no trace in a state_dict; it gets its default.

    Raises:
        ValueError: if a name is missing or unexpected or a shape disagrees; the message lists them.
    """
    state, _ = published_state_dict(state)
    pretrains = any(name.startswith(("se3_angle_layer.", "so3_edge_layer.")) for name in state)
    predicts = any(name.startswith("mixture_of_experts.") for name in state)
    if pretrains == predicts:
        raise ValueError(
            "not a published MGT state_dict: it must hold either the denoising heads (se3_angle_layer, "
            f"so3_edge_layer) or mixture_of_experts, and holds {'both' if predicts else 'neither'}; "
            f"its {len(state)} names begin with: {', '.join(sorted({n.split('.')[0] for n in state})) or '-'}"
        )
    size_sources = {
        "channels": "se3_graph_encoder.atom_embedding.weight",
        "num_scalars": "so3_graph_encoder.equi_update.0.node_linear.weight",
        "num_vectors": "so3_graph_encoder.equi_update.0.nlayer_1.tp.output_mask",
    }
    if predicts:
        size_sources["expert_hidden"] = "mixture_of_experts.experts.0.expert1.weight"
        size_sources["output_dim"] = "mixture_of_experts.experts.0.expert2.weight"
    missing = [name for name in size_sources.values() if name not in state or not state[name].dim()]
    if missing:
        raise ValueError(f"not a published MGT state_dict; sizes are read from what it lacks: {missing}")
    sizes = {size: state[name].shape[0] for size, name in size_sources.items()}
    # The mask of TP1 spans ns×0e + nv×1o + nv×2e, ns + 8 nv numbers.
    sizes["num_vectors"] = (sizes["num_vectors"] - sizes["num_scalars"]) // 8
    blocks = {
        int(m[1]) for m in map(re.compile(r"se3_graph_encoder\.atoms_layer\.(\d+)\.").match, state) if m
    }
    config = MGTConfig(task="predict" if predicts else "pretrain", num_blocks=len(blocks), **sizes)
    _check_shapes(state, published_shapes(config), config)
    return config


def published_shapes(config: MGTConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every parameter and buffer of the published model at these sizes."""
    return dict(_shapes(config))


def _check_shapes(state: State, expected: dict[str, tuple[int, ...]], config: MGTConfig) -> None:
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    differing = [
        f"{name} {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    faults = [
        f"{len(names)} {kind}: {', '.join(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", differing))
        if names
    ]
    if faults:
        raise ValueError(f"state_dict does not fit {config}; " + "; ".join(faults))


def _linear(name: str, n_in: int, n_out: int, bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (n_out, n_in)
    if bias:
        yield f"{name}.bias", (n_out,)


def _norm(name: str, n: int, running: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in ("weight", "bias", *(("running_mean", "running_var") if running else ())):
        yield f"{name}.{part}", (n,)
    if running:
        yield f"{name}.num_batches_tracked", ()


def _attention(name: str, C: int, edge_bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names shared by the edge-wise and the node-wise layer."""
    for part in ("query", "key", "value"):
        yield from _linear(f"{name}.lin_{part}", C, C)
    yield from _linear(f"{name}.lin_edge", C, C, bias=edge_bias)
    for part in ("key_update", "lin_msg_update"):
        yield from _linear(f"{name}.{part}.0", 3 * C, C)
        yield from _linear(f"{name}.{part}.2", C, C)
    yield from _linear(f"{name}.lin_concate", C, C)
    yield from _norm(f"{name}.bn_att", C)
    yield from _norm(f"{name}.bn", C)


def _shapes(config: MGTConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    C, ns, nv = config.channels, config.num_scalars, config.num_vectors
    se3, so3 = "se3_graph_encoder", "so3_graph_encoder"
    for embedding in (f"{se3}.edge_embedding", f"{se3}.angle_embedding", f"{so3}.edge_embedding"):
        yield f"{embedding}.0.centers", (C,)
        yield from _linear(f"{embedding}.1", C, C)
    for view in ("se3", "so3"):
        yield from _linear(f"{view}_graph_encoder.atom_embedding", ATOM_FEATURES, C)
        yield from _linear(f"{view}_projection_encoder.projection", C, C)
        yield from _linear(f"{view}_projection_encoder.fc", C, C)
        yield from _norm(f"{view}_projection_encoder.layer_norm", C, running=False)
    for i in range(config.num_blocks):
        yield from _attention(f"{se3}.edges_layer.{i}", C, edge_bias=False)
        for m in (1, 2, 3):
            yield from _linear(f"{se3}.edges_layer.{i}.lin_key_e{m}", C, C)
            yield from _linear(f"{se3}.edges_layer.{i}.lin_value_e{m}", C, C)
        yield from _attention(f"{se3}.atoms_layer.{i}", C, edge_bias=True)
        yield from _attention(f"{so3}.transconv.{i}", C, edge_bias=True)
        equi = f"{so3}.equi_update.{i}"
        yield from _linear(f"{equi}.node_linear", C, ns)
        yield from _linear(f"{equi}.node_linear_2", ns, C)
        yield from _norm(f"{equi}.bn", ns)
        for layer, width in (("nlayer_1", ns + 8 * nv), ("nlayer_2", ns)):
            yield from _linear(f"{equi}.{layer}.fc.0", C, C)
            yield from _linear(f"{equi}.{layer}.fc.2", C, ns * (ns + 2 * nv))
            yield f"{equi}.{layer}.tp.weight", (0,)
            yield f"{equi}.{layer}.tp.output_mask", (width,)
    if config.task == "pretrain":
        for head in ("se3_angle_layer.anglayer", "so3_edge_layer.edgelayer"):
            yield from _linear(f"{head}1", C, C)
            yield from _linear(f"{head}2", C, 3)
        return
    out, router = config.output_dim, "mixture_of_experts"
    for k in range(2):
        yield from _linear(f"{router}.experts.{k}.expert1", C, config.expert_hidden)
        yield from _linear(f"{router}.experts.{k}.expert2", config.expert_hidden, out)
    yield f"{router}.attention_gate.attention.in_proj_weight", (3 * out, out)
    yield f"{router}.attention_gate.attention.in_proj_bias", (3 * out,)
    yield from _linear(f"{router}.attention_gate.attention.out_proj", out, out)
    yield from _linear(f"{router}.projection", 2 * out, out)
