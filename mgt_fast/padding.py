"""Graphs of few distinct sizes: filler crystals, atoms and edges after the real ones.

A captured step replays over arrays of one shape. Filler stays apart from the real crystals: its edges run
between its own atoms, `CrystalGraph.num_real` keeps it out of every statistic, and a loss leaves it out.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .graph import CrystalGraph

EDGES_A_FILLER_ATOM = 64
"""At most; a program that walks over one atom's edges should not take longer for filler than for crystals."""


def round_up(size: int, multiple: int) -> int:
    """Return the next of the sizes that `multiple` divides and of which there are at most eight an octave."""
    step = max(multiple, 1 << max(size.bit_length() - 4, 0))
    return -(-size // step) * step


def bucket(graph: CrystalGraph) -> tuple[int, int]:
    """Return how many atoms and edges to pad a graph to; at least one atom is filler."""
    num_edges = round_up(graph.num_edges, 64)
    filler_atoms = max(-(-(num_edges - graph.num_edges) // EDGES_A_FILLER_ATOM), 1)
    return round_up(graph.num_atoms + filler_atoms, 16), num_edges


def pad_graph(graph: CrystalGraph, num_atoms: int, num_edges: int, num_crystals: int) -> CrystalGraph:
    """Add filler after the crystals of a graph.

    The last filler crystal holds all filler atoms, others are empty. Filler edges are one ångström long, join
    each atom to itself and are spread evenly over the atoms.

    Args:
        graph: the crystals, none of them filler.
        num_atoms, num_edges, num_crystals: sizes afterwards.

    Returns:
        The graph with `num_real`, on the same device.

    Raises:
        ValueError: if the graph has filler already, is larger than it shall become, or leaves no filler atom
            for the filler edges or no filler crystal for the filler atoms.
    """
    if graph.num_real is not None:
        raise ValueError("the graph is padded already; pad the graph it was made from")
    sizes = {
        "crystals": (graph.num_crystals, num_crystals),
        "atoms": (graph.num_atoms, num_atoms),
        "edges": (graph.num_edges, num_edges),
    }
    for name, (size, padded) in sizes.items():
        if padded < size:
            raise ValueError(f"{size} {name} cannot be padded to {padded}; ask for at least as many")
    crystals, atoms, edges = (padded - size for size, padded in sizes.values())
    if (atoms and not crystals) or (edges and not atoms):
        raise ValueError(
            f"{edges} filler edges, {atoms} filler atoms and {crystals} filler crystals: edges need an atom "
            "and atoms a crystal of their own; ask for one more"
        )

    like = {"dtype": torch.int64, "device": graph.numbers.device}
    first_edge = torch.arange(1, atoms + 1, **like) * edges // max(atoms, 1)  # of the next filler atom
    source = torch.searchsorted(first_edge, torch.arange(edges, **like), right=True) + graph.num_atoms
    edge_vec = graph.edge_vec.new_zeros(edges, 3)
    edge_vec[:, 0] = 1
    starts = graph.batch_ptr.new_full((crystals,), graph.num_atoms)
    starts[-1:] = num_atoms
    frame = torch.eye(3, dtype=graph.frame.dtype, device=graph.frame.device)
    return replace(
        graph,
        numbers=torch.cat((graph.numbers, torch.ones(atoms, **like))),
        edge_index=torch.cat((graph.edge_index, source.expand(2, -1)), dim=1),
        edge_vec=torch.cat((graph.edge_vec, edge_vec)),
        cell_shift=torch.cat((graph.cell_shift, graph.cell_shift.new_zeros(edges, 3))),
        frame=torch.cat((graph.frame, frame.expand(crystals, 3, 3))),
        batch_ptr=torch.cat((graph.batch_ptr, starts)),
        row_ptr=torch.cat((graph.row_ptr, graph.num_edges + first_edge)),
        ids=(*graph.ids, *("filler" for _ in range(crystals))),
        num_real=torch.tensor([size for size, _ in sizes.values()], **like),
    )
