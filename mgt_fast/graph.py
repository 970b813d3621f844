"""The crystal graph and the periodic neighbour list behind it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from numbers import Integral

import torch

from . import _C, frames_cuda, neighbors_cuda
from .elements import has_features
from .structures import CrystalBatch

SHELL_TOLERANCE = 1e-4
"""Relative width of a shell of neighbours; distances no farther apart count as equal."""

_MAX_CUTOFF = 1e7  # Å; more than any two atoms are apart where not periodic


@dataclass(frozen=True)
class CrystalGraph:
    """The periodic graphs of B crystals: N atoms, E directed edges, each beside its reverse.

    Edges are sorted by (row 0, row 1, cell_shift), so the edges that start at one atom are contiguous.

    Attributes:
        numbers: atomic numbers, (N,) int64.
        edge_index: (2, E) int64; row 0 is the atom an edge vector starts from, row 1 the one it points to.
        edge_vec: r_e = x[row 1] + cell_shift · cell − x[row 0], (E, 3), Å.
        cell_shift: lattice translation of the atom pointed to, (E, 3) int32.
        frame: the lattice frame L_1..3 as rows, (B, 3, 3), Å.
        batch_ptr: first atom of each crystal and N at the end, (B + 1,) int64.
        row_ptr: first edge of each atom (CSR over row 0) and E at the end, (N + 1,) int64.
        ids: one name a crystal.
        status: of a graph built with `max_edges`; see `neighbor_list`.
        num_real: of a graph from `padding.pad_graph`: how many crystals, atoms and edges, the first ones, are
            no padding, (3,) int64.
    """

    numbers: torch.Tensor
    edge_index: torch.Tensor
    edge_vec: torch.Tensor
    cell_shift: torch.Tensor
    frame: torch.Tensor
    batch_ptr: torch.Tensor
    row_ptr: torch.Tensor
    ids: tuple[str, ...]
    status: ListStatus | None = None
    num_real: torch.Tensor | None = None

    @property
    def num_atoms(self) -> int:
        """Number of atoms N."""
        return self.numbers.shape[0]

    @property
    def num_edges(self) -> int:
        """Number of directed edges E."""
        return self.edge_index.shape[1]

    @property
    def num_crystals(self) -> int:
        """Number of crystals B."""
        return self.batch_ptr.shape[0] - 1

    @property
    def batch(self) -> torch.Tensor:
        """Crystal of each atom, (N,) int64."""
        crystals = torch.arange(self.num_crystals, device=self.batch_ptr.device)
        return crystals.repeat_interleave(self.batch_ptr.diff(), output_size=self.num_atoms)

    def to(self, *, device=None, dtype: torch.dtype | None = None) -> CrystalGraph:
        """Return the graph on `device`, with its lengths in `dtype`."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                moved[field.name] = value.to(device, dtype if value.is_floating_point() else None)
        return replace(self, **moved)

    def check_status(self) -> None:
        """Wait for a graph that was built with room for exactly its edges, and see whether all is well.

        Raises:
            ValueError: as `ListStatus.check`; if there are fewer edges than there was room for.
        """
        if self.status is not None and (found := self.status.check()) != self.num_edges:
            raise ValueError(
                f"{self.num_edges} edges were expected and {found} found in the graphs of "
                f"{', '.join(self.ids)}; the stored counts are those of other crystals: prepare them again"
            )


@dataclass(frozen=True)
class NeighborList:
    """Pairs of neighbouring atoms, sorted by (row 0, row 1, cell_shift).

    Attributes:
        edge_index: (2, E) int64; row 0 is the atom an edge vector starts from, row 1 the one it points to.
        edge_vec: r_e = x[row 1] + cell_shift · cell − x[row 0], (E, 3) float64, Å.
        cell_shift: lattice translation of the atom pointed to, (E, 3) int32; it refers to the positions as
            given, inside the cell or not, and is zero along axes that are not periodic.
        row_ptr: first edge of each atom (CSR over row 0) and E at the end, (N + 1,) int64.
        shell_margin: (N,) float64, on request: smallest |d / d_k − (1 + shell_tolerance)| over the
            distances d from an atom, d_k that of its k-th neighbour. An atom whose margin is below the
            relative noise of its distances may gain or lose a shell. At most shell_tolerance, which the k-th
            neighbour itself is away.
        status: of a list built with `max_edges`; see `neighbor_list`.
    """

    edge_index: torch.Tensor
    edge_vec: torch.Tensor
    cell_shift: torch.Tensor
    row_ptr: torch.Tensor
    shell_margin: torch.Tensor | None = None
    status: ListStatus | None = None


@dataclass(frozen=True)
class ListStatus:
    """What became of a list of fixed capacity, known on the device alone until `check` asks.

    Attributes:
        device_values: number of edges there are, and index of the first crystal that is refused (B if all is
            well), (2,) int64 on the device. After a fault the number is that of the edges counted until then.
        max_edges: the capacity.
        crystals: the batch.
        options: how `neighbor_list` was called.
    """

    device_values: torch.Tensor
    max_edges: int
    crystals: CrystalBatch
    options: dict

    def check(self) -> int:
        """Return the number of edges; this waits for the device.

        Raises:
            ValueError: for a crystal at fault, as `neighbor_list` does; if `max_edges` is too small: the
                list is then empty, and the message names the capacity needed. It is device_values[0]; to try
                again with it, as nothing here does by itself, build the list anew with that `max_edges`.
        """
        n_edges, fault = self.device_values.tolist()
        if fault < len(self.crystals):
            _C.neighbor_list(_arrays(self.crystals.to("cpu")), **self.options)  # raises, and says why
            raise RuntimeError(
                f"structure {self.crystals.ids[fault]!r} was refused on {self.device_values.device} and "
                "accepted on the CPU; please report it"
            )
        if n_edges > self.max_edges:
            raise ValueError(f"max_edges = {self.max_edges}, but there are {n_edges} edges; make it larger")
        return n_edges


def neighbor_list(
    crystals: CrystalBatch,
    *,
    cutoff: float | None = None,
    max_neighbors: int | None = None,
    half: bool = False,
    shell_tolerance: float = SHELL_TOLERANCE,
    shell_margin: bool = False,
    threads: int | None = None,
    max_edges: int | None = None,
) -> NeighborList:
    """Find the neighbours of every atom, periodic images among them.

    With `cutoff`: all pairs with 0 < d <= cutoff. With `max_neighbors` = k: each atom keeps all neighbours
    with d <= d_k (1 + shell_tolerance), d_k the distance of its k-th, so that shells of equal distances stay
    whole; then each edge is joined by its reverse, each once: it is listed if either of its ends keeps it.

    Crystals on a CUDA device are worked on there, and the list is the same, pair for pair and in order. The
    host waits once, for the number of edges; with `max_edges` it does not, and the call can be captured in a
    CUDA graph (after one call that loads the kernels).

    Args:
        crystals: B crystals; atoms may lie outside the cell, cells may be skewed.
        cutoff: largest distance, Å.
        max_neighbors: k; atoms get at least so many neighbours.
        half: keep one of each edge (i, j, S) and its reverse (j, i, −S): the one with i < j or, between
            images of the same atom, with S lexicographically positive.
        shell_tolerance: relative width of a shell.
        shell_margin: report in `NeighborList.shell_margin` how close shells are to the tolerance.
        threads: threads over the crystals, at most one a core; torch's number when absent. The result does
            not depend on it.
        max_edges: on a CUDA device: return arrays of this many edges, zero after the last one, and report in
            `NeighborList.status`. The edges there are end at row_ptr[-1]; if they do not fit, or a crystal is
            at fault, the list is empty and `status.check()` raises. The caller then tries again with room for
            status.device_values[0] edges, or without a limit.

    Raises:
        TypeError: for a batch whose tensors have other types than `CrystalBatch` says.
        ValueError: for wrong arguments, and, naming the structure, the atom and the value, for non-finite
            numbers, lengths beyond 10^6 Å, a cell volume below 1e-3 Å^3, atoms closer than 0.01 Å (to each
            other or to an own image), too few atoms for k without periodicity, or a search too large to be
            meant (over 10^6 expected neighbours an atom, 10^8 edges or 4·10^6 images a crystal); for crystals
            that require a gradient, which edges do not carry.
        MemoryError: on the CPU, if there is no room for the list. (Memory is used again from call to call; up
            to 256 MiB stay with the process.)
    """
    if (cutoff is None) == (max_neighbors is None):
        raise ValueError(f"cutoff = {cutoff} and max_neighbors = {max_neighbors}; give exactly one of them")
    if cutoff is not None and not 0 < cutoff <= _MAX_CUTOFF:
        raise ValueError(f"cutoff = {cutoff} Å; it must be positive and at most 10^7")
    if max_neighbors is not None:
        max_neighbors = _count("max_neighbors", max_neighbors)
    if not 0 <= shell_tolerance < 1:
        raise ValueError(f"shell_tolerance = {shell_tolerance}; it must lie in [0, 1)")
    if shell_margin and max_neighbors is None:
        raise ValueError("shell_margin needs max_neighbors: with a cutoff there are no shells")
    if max_edges is not None:
        max_edges = _count("max_edges", max_edges)
    # Of exactly these types: a kernel's parameter is as wide as the Python type it is handed.
    options = {
        "cutoff": 0.0 if cutoff is None else float(cutoff),
        "max_neighbors": 0 if max_neighbors is None else max_neighbors,
        "half": bool(half),
        "shell_tolerance": float(shell_tolerance),
        "shell_margin": bool(shell_margin),
        "threads": _threads(threads),
    }
    if crystals.numbers.is_cuda:
        return _neighbors_on_device(crystals, options, max_edges)
    if max_edges is not None:
        raise ValueError(f"max_edges needs crystals on a CUDA device; they are on {crystals.numbers.device}")
    found = _C.neighbor_list(_arrays(crystals), **options)
    return NeighborList(**{name: torch.from_numpy(array) for name, array in found.items()})


def _neighbors_on_device(crystals: CrystalBatch, options: dict, max_edges: int | None) -> NeighborList:
    _check_tensors(crystals)
    search = neighbors_cuda.count_edges(crystals, **{k: v for k, v in options.items() if k != "threads"})
    if max_edges is None:
        n_edges = ListStatus(search.status, 2**63 - 1, crystals, options).check()
        return NeighborList(**neighbors_cuda.fill_edges(search, n_edges, padded=False))
    status = ListStatus(search.status, max_edges, crystals, options)
    return NeighborList(**neighbors_cuda.fill_edges(search, max_edges, padded=True), status=status)


def build_graph(
    crystals: CrystalBatch,
    max_neighbors: int = 25,
    compat: str | None = None,
    *,
    shell_tolerance: float = SHELL_TOLERANCE,
    threads: int | None = None,
    max_edges: int | None = None,
) -> CrystalGraph:
    """Build the graphs MGT works on: whole shells of nearest neighbours, and the lattice frame.

    By default edges and frame depend on the crystal alone: rotating, shifting, repeating it, reordering its
    atoms or describing it with another cell changes nothing but the description. The frame is a reduced basis
    of the primitive lattice, right-handed; the edges choose between bases the lattice alone cannot tell
    apart. Along an axis without periodicity the given cell vector stands in the frame. Tolerances (1e-4 on
    lengths and cosines, 0.01 Å on translations) draw lines: a crystal right on one may get another frame, or
    another shell, from a description that differs by rounding.

    Crystals on a CUDA device are worked on there, as by `neighbor_list`; the graph is bit for bit the same.

    Args:
        crystals: B crystals; on the CPU for `compat`.
        max_neighbors: k; see `neighbor_list`.
        compat: "comformer" builds edges and frame as ComFormer's published builder does, for checkpoints
            trained on its graphs: shells cut where rounding cuts them, pairs closer than 0.15 Å ignored,
            edges between images of one atom twice, frame from the given cell.
        shell_tolerance: relative width of a shell; of `compat` graphs, which know no shells, the default.
        threads: threads over the crystals, at most one a core; torch's number when absent. The result does
            not depend on it.
        max_edges: on a CUDA device: room for so many edges, so that the host need not wait for their number;
            see `neighbor_list`. If they do not fit, or a crystal is at fault, `CrystalGraph.status.check()`
            raises, and the caller tries again as there.

    Raises:
        TypeError: as `neighbor_list`.
        ValueError: as `neighbor_list`; for an unknown `compat`; with "comformer", for a crystal that is not
            periodic in three directions, for another `shell_tolerance`, and for `max_edges`.

    Source: arXiv 2403.11857 (ComFormer) and its published program, for `compat="comformer"`.
    """
    if compat not in (None, "comformer"):
        raise ValueError(f"compat = {compat!r}; choose None or 'comformer'")
    if not 0 <= shell_tolerance < 1:
        raise ValueError(f"shell_tolerance = {shell_tolerance}; it must lie in [0, 1)")
    if compat is not None and shell_tolerance != SHELL_TOLERANCE:
        raise ValueError(
            f"shell_tolerance = {shell_tolerance} with compat = {compat!r}, whose graphs have no tolerance; "
            "leave one of them out"
        )
    if compat is None and crystals.numbers.is_cuda:
        neighbors = neighbor_list(
            crystals,
            max_neighbors=max_neighbors,
            shell_tolerance=shell_tolerance,
            threads=threads,
            max_edges=max_edges,
        )
        edges = neighbors.edge_index, neighbors.edge_vec, neighbors.row_ptr
        first_fault = None if neighbors.status is None else neighbors.status.device_values[1:]
        frame = frames_cuda.lattice_frames(crystals, *edges, first_fault)
    else:
        if max_edges is not None:
            raise ValueError("max_edges is for graphs built on a CUDA device, and not for 'comformer'")
        max_neighbors = _count("max_neighbors", max_neighbors)
        arrays, options = _arrays(crystals), {"max_neighbors": max_neighbors, "threads": _threads(threads)}
        if compat == "comformer":
            built = _C.comformer_graph(arrays, **options)
        else:
            numbers = crystals.numbers.contiguous().numpy()
            built = _C.crystal_graph(
                arrays, numbers=numbers, shell_tolerance=float(shell_tolerance), **options
            )
        frame = torch.from_numpy(built.pop("frame"))
        neighbors = NeighborList(**{name: torch.from_numpy(array) for name, array in built.items()})
    return CrystalGraph(
        numbers=crystals.numbers,
        edge_index=neighbors.edge_index,
        edge_vec=neighbors.edge_vec,
        cell_shift=neighbors.cell_shift,
        frame=frame,
        batch_ptr=crystals.batch_ptr,
        row_ptr=neighbors.row_ptr,
        ids=crystals.ids,
        status=neighbors.status,
    )


def network_input(
    crystals: CrystalBatch,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    max_neighbors: int,
    compat: str | None,
    shell_tolerance: float = SHELL_TOLERANCE,
    num_edges: int | None = None,
) -> CrystalGraph:
    """Build the graphs that a network takes: on its device, with lengths in its floating-point type.

    A CUDA device builds them itself, from the crystals, which are smaller than their graphs; those of
    `compat` come from the CPU.

    Args:
        crystals: B crystals, best on the CPU.
        device: where the network is.
        dtype: the network's floating-point type.
        max_neighbors, compat, shell_tolerance: see `build_graph`.
        num_edges: how many edges there are, where that is known: a CUDA device then builds the graphs without
            the host waiting; `CrystalGraph.check_status` waits, later.

    Raises:
        TypeError, ValueError: as `build_graph`; for an element without features, naming structure, atom and
            atomic number (crystals on a CUDA device are not looked at: a network asserts it there).
        RuntimeError: on a CUDA device without CuPy.
    """
    if not crystals.numbers.is_cuda:
        _check_elements(crystals)
    if compat is None and device.type == "cuda":
        crystals = crystals.to(device)
    max_edges = num_edges if compat is None and crystals.numbers.is_cuda else None
    graph = build_graph(
        crystals,
        max_neighbors=max_neighbors,
        compat=compat,
        shell_tolerance=shell_tolerance,
        max_edges=max_edges,
    )
    return graph.to(device=device, dtype=dtype)


def _check_elements(crystals: CrystalBatch) -> None:
    _check_tensors(crystals)
    numbers, batch_ptr = crystals.numbers, crystals.batch_ptr
    # Element 0 is none, and stands in for numbers outside the table.
    known = torch.from_numpy(has_features())
    unknown = torch.nonzero(~known[numbers.where((numbers > 0) & (numbers < len(known)), 0)]).flatten()
    if unknown.numel():
        atom = int(unknown[0])
        b = int(torch.searchsorted(batch_ptr, atom, right=True)) - 1
        raise ValueError(
            f"structure {crystals.ids[b]!r}, atom {atom - int(batch_ptr[b])}: there are no CGCNN features "
            f"for atomic number {int(numbers[atom])}; leave the structure out"
        )


def _count(name: str, value: int) -> int:
    if not (isinstance(value, Integral) and 1 <= value <= 10**9):
        raise ValueError(f"{name} = {value!r}; it must be a whole number from 1 to 10^9")
    return int(value)


def _threads(threads: int | None) -> int:
    return _count("threads", torch.get_num_threads() if threads is None else threads)


def _check_tensors(crystals: CrystalBatch) -> None:
    n_atoms, n_crystals = crystals.numbers.numel(), len(crystals)
    expected = {
        "numbers": (torch.int64, (n_atoms,)),
        "frac_coords": (torch.float64, (n_atoms, 3)),
        "cell": (torch.float64, (n_crystals, 3, 3)),
        "batch_ptr": (torch.int64, (n_crystals + 1,)),
        "pbc": (torch.bool, (n_crystals, 3)),
    }
    for name, (dtype, shape) in expected.items():
        tensor = getattr(crystals, name)
        if tensor.dtype != dtype:
            raise TypeError(
                f"crystals.{name} is {tensor.dtype}, expected {dtype}; CrystalBatch.from_arrays converts it"
            )
        if tuple(tensor.shape) != shape:
            raise ValueError(f"crystals.{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.requires_grad:
            raise ValueError(
                f"crystals.{name} requires a gradient, which edges do not carry; detach it, and compute the "
                "vectors to differentiate from edge_index and cell_shift"
            )
        if tensor.device != crystals.numbers.device:
            raise ValueError(
                f"crystals.{name} is on {tensor.device} and crystals.numbers on {crystals.numbers.device}; "
                "move the batch as a whole with crystals.to(device)"
            )


def _arrays(crystals: CrystalBatch) -> _C.Batch:
    """Hand the batch to the compiled part, without a copy where it is contiguous."""
    if crystals.numbers.device.type != "cpu":
        raise ValueError(
            f"crystals are on {crystals.numbers.device}; bring them back with crystals.to('cpu')"
        )
    _check_tensors(crystals)
    tensors = (crystals.frac_coords, crystals.cell, crystals.batch_ptr, crystals.pbc)
    return _C.Batch(*(tensor.contiguous().numpy() for tensor in tensors), crystals.ids)
