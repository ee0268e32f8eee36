"""Whether the state of a training run fits into the memory of the GPUs."""

import math
from dataclasses import dataclass

from halfulp.hardware import Gpu
from halfulp.plan.said import Said, said

# fp32 weights and gradients, two moments of AdamW in fp32: what `halfulp train` keeps.
STATE_BYTES = 4 + 4 + 8
SERVED_BYTES = 2  # a BF16 copy
USABLE = 0.8  # of the memory; the rest is for activations, buffers and fragmentation


@dataclass(frozen=True, kw_only=True)
class Memory:
    """State in GB (1e9 bytes), GPUs that hold it sharded, and the verdict for those given."""

    state_gb: float
    gpu_gb: float
    least_gpus: int
    gpus: int | None
    serving_gb: float

    @property
    def verdict(self) -> str:
        """pass, fail, or could not tell where no number of GPUs was given."""
        if self.gpus is None:
            return "could not tell"
        return "pass" if self.gpus >= self.least_gpus else "fail"

    @property
    def sentence(self) -> Said:
        """What is needed, in words."""
        need = said(
            "memory", state=self.state_gb, bytes=STATE_BYTES, least=self.least_gpus,
            gpus=said("gpu" if self.least_gpus == 1 else "gpus"), gpu=self.gpu_gb,
        )  # fmt: skip
        return need if self.gpus is None else said("memory_given", need=need, gpus=self.gpus)


def memory_of(parameters: float, gpu: Gpu, gpus: int | None) -> Memory:
    """What training `parameters` needs; activations are covered by the part left free."""
    state = STATE_BYTES * parameters / 1e9
    return Memory(
        state_gb=state,
        gpu_gb=gpu.memory_gb,
        least_gpus=max(1, math.ceil(state / (USABLE * gpu.memory_gb))),
        gpus=gpus,
        serving_gb=SERVED_BYTES * parameters / 1e9,
    )
