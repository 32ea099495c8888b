"""MomentumSAM in several processes: DistributedDataParallel, the workers of a DataLoader."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from tests.optim.momentum import same
from tests.optim.nets import Net, X, clean_copy, loss_of, optimizer_of, train
from tests.processes import eager_passes, importable, spawn
from tests.training import weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


class Normalised(Dataset):
    """Its transforms are modules, as those of torchvision are; one is a copy of a part of the model."""

    def __init__(self, part: nn.Module):
        self.transform, self.part = nn.Sequential(nn.Identity(), nn.Hardtanh()), part

    def __len__(self):
        return 8

    def __getitem__(self, i):
        with torch.no_grad():
            return self.part(self.transform(torch.full((4,), i / 8)))


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_modules_in_the_workers_of_a_data_loader_do_what_they_do_here(start):
    model = Net()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    dataset = Normalised(clean_copy(model).body)
    expected = torch.stack([dataset[i] for i in range(8)])
    loader = DataLoader(dataset, batch_size=8, num_workers=1, multiprocessing_context=start)
    with importable():
        for batch in loader:
            torch.testing.assert_close(batch, expected)
    train(model, optimizer)


def train_under_ddp(rank: int, n: int, folder) -> list:
    model = DistributedDataParallel(Net())
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    # Halves of the same loss: their sum is exact.
    for _ in range(2):
        optimizer.zero_grad()
        with model.no_sync():
            (loss_of(model) / 2).backward()
        perturbed = optimizer.perturbed
        (loss_of(model) / 2).backward()
        if rank == 0:
            # What only one rank does must not make the ranks differ.
            model.module.eval()
            model.module(X)
            model.module.train()
        optimizer.step()
    return [perturbed, *weights_of(model)]


@pytest.mark.slow
def test_ddp_trains_to_the_bits_of_one_process(tmp_path):
    """Both ranks see the same batch, and the mean of two equal gradients is exact."""
    model = Net()
    with eager_passes():
        train(model, optimizer_of(model))
    for perturbed, *weights in spawn(train_under_ddp, 2, tmp_path):
        assert perturbed
        assert same(weights, model.parameters())
