"""GPUs that programs can be compiled for: `cards.toml`, typed."""

import functools
import tomllib
from pathlib import Path
from typing import Any, Literal, NamedTuple

CardName = Literal["h100", "h200", "a100"]
_FILE = Path(__file__).with_name("cards.toml")


class Rates(NamedTuple):
    """Assumed practical rates: products in FLOP/s by precision, traffic in bytes/s."""

    tf32: float
    bf16: float
    f32: float
    memory: float
    cache: float


class Card(NamedTuple):
    """A GPU.

    Attributes:
        name: as its driver gives it.
        target: fields of XLA's `GpuDeviceInfoProto`.
    """

    name: str
    rates: Rates
    target: dict[str, Any]

    @property
    def memory(self) -> int:
        """Bytes of its memory."""
        return self.target["device_memory_size"]

    @property
    def cores(self) -> int:
        """Streaming multiprocessors."""
        return self.target["core_count"]

    def target_config(self) -> str:
        """Returns XLA's description of the card, a `GpuTargetConfigProto` in text."""
        target = dict(self.target)
        capability = target.pop("compute_capability")
        sizes = "\n  ".join(f"{field}: {value}" for field, value in target.items())
        return _CONFIG.format(sizes=sizes, capability=capability, name=self.name)


# Limits that these cards share, and the CUDA versions that the program may rely on.
_CONFIG = """gpu_device_info {{
  {sizes}
  cuda_compute_capability {{ {capability} }}
  name: "{name}"
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 fpus_per_core: 128
  shared_memory_per_block: 49152 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
  driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{name}"
"""


@functools.cache
def all_cards() -> dict[str, Card]:
    """Returns every card of `cards.toml`, by its short name."""
    table = tomllib.loads(_FILE.read_text())
    return {
        name: Card(entry["name"], Rates(**entry["rates"]), entry["target"]) for name, entry in table.items()
    }
