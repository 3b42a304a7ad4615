"""Data-parallel training of a small network with PyTorch (gloo, CPU), written for torchrun and started by slurmfork.

It reads nothing but the variables that torchrun sets, and prints the loss from rank 0.
"""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    dist.init_process_group("gloo")  # RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT come from the environment
    rank = dist.get_rank()
    torch.manual_seed(0)
    true_weights = torch.randn(16, 1)
    model = DistributedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    torch.manual_seed(1 + rank)  # every rank has data of its own
    for step in range(int(os.environ.get("STEPS", "60"))):
        inputs = torch.randn(64, 16)
        loss = torch.nn.functional.mse_loss(model(inputs), inputs @ true_weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0 and step % 10 == 0:
            print(f"step {step} loss {mean.item() / dist.get_world_size():.4f}", flush=True)
    if rank == 0:
        print(f"world {dist.get_world_size()} final {mean.item() / dist.get_world_size():.4f}", flush=True)
    dist.barrier()  # nobody leaves while another still talks
    del model
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
