"""Training with bfloat16 factors goes the way float32 training goes."""

import numpy as np
import pytest
import torch

from mgt_fast import MGT, MGTConfig, build_graph
from mgt_fast.data import CrystalDataset

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, BATCH = 40, 16


@pytest.fixture(scope="module")
def batches():
    """Some small bundled crystals with their formation energies, eV/atom."""
    dataset = CrystalDataset.open(None)
    energies = dataset.targets["formation_energy_per_atom"]
    small = (dataset.num_atoms <= 6) & ~np.isnan(energies)
    chosen = np.random.default_rng(0).choice(np.flatnonzero(small), (3, BATCH), replace=False)
    graphs = [build_graph(dataset.gather(np.sort(part)), 8).to(device=DEVICE) for part in chosen]
    targets = [torch.tensor(energies[np.sort(part)], device=DEVICE).float() for part in chosen]
    return list(zip(graphs, targets, strict=True))


def losses(batches, seed, *, narrow):
    """Loss of every step of a short training run."""
    torch.manual_seed(seed)
    model = MGT(MGTConfig(channels=32, num_blocks=1, dropout=0.0)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for step in range(STEPS):
        graph, target = batches[step % len(batches)]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=narrow):
            predicted = model(graph).prediction.squeeze(1)
        loss = (predicted.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return np.array(history)


def test_bfloat16_training_follows_float32(batches):
    wide, narrow = (
        np.stack([losses(batches, seed, narrow=narrow) for seed in range(3)]) for narrow in (False, True)
    )
    assert (wide[:, -6:].mean(1) < 0.5 * wide[:, :3].mean(1)).all()  # they learn
    spread = np.ptp(wide, axis=0).mean()
    assert np.abs(wide.mean(0) - narrow.mean(0)).mean() < spread
