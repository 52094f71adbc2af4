"""A plan carried out: where each network's weights live, and how they get to the device that computes.

What leaves the device is not copied back: its home, in host memory or in its files, holds the base weights, and
adapters are merged anew when it returns. Streamed blocks live in host memory, and are merged there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from flux_lora.checkpoint.assembling import Checkpoints, Network, move_buffers
from flux_lora.checkpoint.reading import StoredTensor, fill
from flux_lora.device import devices
from flux_lora.device.transfers import Arena, host_memory, lay_out, release
from flux_lora.errors import DeviceMemoryError
from flux_lora.memory import measure as measured
from flux_lora.memory import plans
from flux_lora.memory.plans import Choice, Room, Sizes, Where, readable
from flux_lora.memory.streaming import Stream, StreamedBlock
from flux_lora.settings import Settings
from flux_lora.speed import projections
from flux_lora.speed.quantization import QuantizedLinear, Scheme, prepare

Log = Callable[[str], None]
Done = TypeVar("Done")
Reads = list[tuple[StoredTensor, Tensor]]

OUT_OF_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory", "out of memory")
"""What libraries say in a plain RuntimeError when memory ran out."""


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def place(
    loaded: Checkpoints,
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
    log: Log,
    scheme: Scheme | None = None,
) -> "Placement":
    """Choose a memory plan for what there is room for, say so, and load the weights as it says.

    Args:
        loaded: networks without weights.
        settings: the operator's.
        device: computes.
        dtype: of the weights.
        log: receives one readable line at a time.
        scheme: how the speed profile quantizes transformers, if it does; what is streamed is not quantized.

    Raises:
        DeviceMemoryError: no plan fits; the message holds the numbers.
        WeightsError: a file cannot be read.
    """
    sizes, room = measured.sizes(loaded.networks, dtype), measured.room(device, settings.memory_budget)
    choice = plans.choose(sizes, room, lossy=scheme is not None, named=settings.memory_plan)
    placement = Placement(loaded, sizes, room, choice, device, log, scheme)
    log(placement.describe())
    placement.surviving(lambda: placement.enter(next(iter(loaded.networks))))
    return placement


@dataclass(frozen=True)
class Orders:
    """Where one network is to live."""

    where: Where
    leaves: bool
    """Whether it makes room for another when that one computes."""
    kept: bool
    """Whether it then stays in host memory."""
    stay: int
    """Bytes of its blocks that are not streamed."""


@dataclass
class Placed:
    """One network, and where its weights are."""

    component: str
    network: Network
    device: torch.device
    orders: Orders
    when_unloaded: list[Callable[[Sequence[str]], None]] = field(default_factory=list)
    """Called with the names of parameters whose weights are freed: when they come back, they are the base weights."""
    settled: bool = False
    inside: bool = False
    """Whether all that is not streamed is on the device."""
    held: tuple[str, ...] = ()
    """The parameters that are not streamed."""
    home: Arena | None = None
    """Their base weights in host memory."""
    stream: Stream | None = None
    quantized: Mapping[str, QuantizedLinear] = field(default_factory=dict)
    """By the names of the weights whose places they have."""
    precise: Arena | None = None
    """The base weights of those in host memory."""
    fused: bool = False
    """Whether query, key and value are one product, where nothing is streamed."""

    def settle(self) -> Reads:
        """Make room as ordered; returns what is to be read from files now."""
        self.settled = True
        reads: Reads = []
        streamed: set[str] = set()
        if self.orders.where == "streamed":
            self.stream, weights = self._make_stream()
            streamed, reads = set(weights), self._reads(weights)
        elsewhere = streamed | self.quantized.keys()
        self.held = projections.in_order(name for name in self.network.parameters if name not in elsewhere)
        if self.orders.leaves and self.orders.kept:
            self.home = self._lay_out(self.held, lambda size: host_memory(size, self.device))
            self.precise = self._lay_out(self.quantized, lambda size: host_memory(size, self.device))
            reads += self._reads(self.home.tensors) + self._reads(self.precise.tensors)
        return reads

    def arrive(self) -> Reads:
        """Bring to the device what is not streamed; returns what is to be read from files for that."""
        for layer in self.quantized.values():
            layer.move(self.device)
        move_buffers(self.network.module, self.device)
        there = self._lay_out(self.held, lambda size: torch.empty(size, dtype=torch.uint8, device=self.device))
        if self.home:
            there.memory.copy_(self.home.memory, non_blocking=True)
        for name, tensor in there.tensors.items():
            self.network.parameters[name].data = tensor
        for name, layer in self.quantized.items():
            base = self.precise.tensors[name] if self.precise else self.network.readers[name]().to(layer.dtype)
            layer.write_rows(0, len(base), base)
        self.inside = True
        self._fuse()
        return [] if self.home else self._reads(there.tensors)

    def leave(self) -> None:
        """Make room on the device, if so ordered."""
        if self.stream:
            self.stream.leave()
        if self.orders.leaves and not self.orders.kept:
            self.unsettle()
        elif self.orders.leaves and self.inside:
            self.inside = False
            self._unload((*self.held, *self.quantized))

    def unsettle(self) -> None:
        """Free all memory."""
        if self.stream:
            self.stream.end()
        self._unload(self.network.parameters)
        self.settled, self.inside, self.stream, self.home, self.precise = False, False, None, None, None

    def fuse(self) -> None:
        """Compute query, key and value as one from now on, now and whenever the weights are on the device."""
        self.fused = True
        if self.inside:
            self._fuse()

    def base(self, name: str) -> Tensor | Callable[[], Tensor] | None:
        """Where the base weights of a parameter are beside itself; None: nowhere, so they are to be kept."""
        if not self.orders.leaves or (name not in self.held and name not in self.quantized):
            return None
        home = self.precise if name in self.quantized else self.home
        return home.tensors[name] if home else self.network.readers[name]

    def _make_stream(self) -> tuple[Stream | None, Mapping[str, Tensor]]:
        names = measured.block_names(self.component, self.network)
        sizes = [sum(self.network.parameters[name].nbytes for name in of_block) for of_block in names.values()]
        staying = plans.staying(sizes, self.orders.stay)
        passing = [prefix for index, prefix in enumerate(names) if index not in staying]
        blocks = [
            StreamedBlock({name: self.network.parameters[name] for name in names[prefix]}, self.device)
            for prefix in passing
        ]
        modules = [self.network.module.get_submodule(prefix) for prefix in passing]
        stream = Stream(modules, blocks, self.device) if blocks else None
        if stream:
            stream.rest()
        return stream, {name: tensor for block in blocks for name, tensor in block.host.tensors.items()}

    def _lay_out(self, names: Iterable[str], get: Callable[[int], Tensor]) -> Arena:
        parameters = {name: self.network.parameters[name] for name in names}
        dtype = next(iter(self.network.parameters.values())).dtype
        return lay_out({name: parameter.shape for name, parameter in parameters.items()}, dtype, get)

    def _reads(self, tensors: Mapping[str, Tensor]) -> Reads:
        return [(self.network.stored[name], tensor) for name, tensor in tensors.items()]

    def _fuse(self) -> None:
        if self.fused and not self.stream:
            projections.fuse(self.network.module)

    def _unload(self, names: Iterable[str]) -> None:
        names = list(names)
        if self.fused:
            projections.separate(self.network.module)  # the whole would keep the memory of its parts
        self.network.unload(names)
        for layer in self.quantized.values():
            layer.move(torch.device("meta"))
        for call in self.when_unloaded:
            call(names)


class Placement:
    """All networks of a server under one plan, and under a smaller one when memory has run out."""

    def __init__(
        self,
        loaded: Checkpoints,
        sizes: Sizes,
        room: Room,
        choice: Choice,
        device: torch.device,
        log: Log,
        scheme: Scheme | None = None,
    ) -> None:
        """Take networks without weights; `enter` loads them."""
        self._sizes, self._room, self._device, self._log = sizes, room, device, log
        self.choice = choice
        shared = next(iter(loaded.networks.values()))
        self._placed: dict[str, Placed] = {}
        for key, component, network in (
            *((name, name, network) for name, network in shared.items() if name != "transformer"),
            *((model, "transformer", networks["transformer"]) for model, networks in loaded.networks.items()),
        ):
            self._placed[key] = Placed(component, network, device, self._orders(component))
        self._models = tuple(loaded.networks)
        self._quantizes = scheme is not None and not self.streams_transformers
        if scheme and self._quantizes:
            for model in self._models:
                self._placed[model].quantized = prepare(self._placed[model].network.module, scheme)
        elif scheme:
            log("the transformers' blocks are streamed, and so not quantized")

    @property
    def drawing(self) -> tuple[str, ...]:
        """The models whose transformers are on the device now."""
        return tuple(model for model in self._models if self._placed[model].inside)

    @property
    def streams_transformers(self) -> bool:
        """Whether the transformers' blocks pass through the device."""
        return any(self._placed[model].orders.where == "streamed" for model in self._models)

    def placed(self, key: str) -> Placed:
        """A network and where its weights live.

        Args:
            key: a model for its transformer, else the component's name.
        """
        return self._placed[key]

    def fuse_projections(self) -> None:
        """Compute the transformers' query, key and value as one; call it when `when_unloaded` is complete."""
        for model in self._models:
            self._placed[model].fuse()

    def enter(self, model: str) -> None:
        """Bring a model's transformer, and what every model needs, to the device."""
        for placed in self._placed.values():
            if placed.stream:
                placed.stream.rest()
        for other in self._models:
            if other != model:
                self._placed[other].leave()
        self._load(model)

    def encoded(self) -> None:
        """The text encoders have done their work: free what they took for it."""
        if stream := self._placed["text_encoder_2"].stream:
            stream.leave()

    def surviving(self, work: Callable[[], Done], before_retry: Callable[[], None] = lambda: None) -> Done:
        """Do some work; when memory runs out, do all of it again under the next plan of the same precision, once.

        Args:
            before_retry: ends what the first attempt has left running.

        Raises:
            DeviceMemoryError: memory ran out under both plans, or there is no smaller one.
        """
        tried = []
        for last in (False, True):
            try:
                return work()
            except Exception as error:
                if not ran_out(error):
                    raise
                shortage = str(error).partition("\n")[0] or type(error).__name__
            # Only here, beyond the handler, is free what the failed attempt had allocated: the traceback held it.
            before_retry()
            release(self._device)
            tried.append(self.choice.plan.name)
            if last or not self._fall():
                break
            self._log(f"out of memory under the plan {tried[0]} ({shortage}): all of it again, with another")
            self._log(self.describe())
        raise DeviceMemoryError(
            f"{self._device} ran out of memory ({shortage}), under the plan {' and then '.join(tried)}: it was to need "
            f"{readable(self.choice.device)}, and {readable(devices.free_memory(self._device))} are free now. "
            "Ask for a smaller size, or run the service on a larger device."
        )

    def describe(self) -> str:
        """Plan, budget and what lives where, in one line."""
        return describe(self.choice, self._sizes, self._room)

    def _fall(self) -> bool:
        """Change to the next plan of the same precision; False, and nothing is changed, when there is none."""
        try:
            self.choice = plans.choose(self._sizes, self._room, lossy=self._quantizes, after=self.choice)
        except DeviceMemoryError:
            return False
        for placed in self._placed.values():
            orders = self._orders(placed.component)
            if orders != placed.orders:
                placed.unsettle()
                placed.orders = orders
        release(self._device)
        return True

    def _orders(self, component: str) -> Orders:
        plan, count = self.choice.plan, len(self._sizes.transformers)
        match component:
            case "transformer":
                where = plans.transformers_where(plan, count)
                return Orders(where, where != "device" and count > 1, self.choice.kept, self.choice.stay)
            case "text_encoder_2":
                return Orders(plan.t5, leaves=False, kept=True, stay=0)
            case _:
                return Orders("device", leaves=False, kept=True, stay=0)

    def _load(self, model: str) -> None:
        """Load all that the plan wants in memory while a model draws, and is not."""
        wanted = [
            placed
            for key, placed in self._placed.items()
            if key == model or not placed.orders.leaves or (placed.orders.kept and not placed.settled)
        ]
        arriving = [p for p in wanted if not p.inside and (p is self._placed[model] or not p.orders.leaves)]
        changing = [placed for placed in wanted if not placed.settled or placed in arriving]
        try:
            reads: Reads = []
            for placed in wanted:
                reads += [] if placed.settled else placed.settle()
            for placed in arriving:
                reads += [] if placed.home else placed.arrive()
            if reads:
                fill(reads)
            for placed in arriving:
                if placed.home:
                    placed.arrive()
        except BaseException:
            for placed in changing:
                placed.unsettle()
            raise


def describe(choice: Choice, sizes: Sizes, room: Room) -> str:
    """Plan, budget and what lives where, in one line."""
    plan, count = choice.plan, len(sizes.transformers)
    models = " and ".join(sizes.transformers)
    largest = max(sizes.transformers.values(), key=lambda weights: weights.total)
    stays = min(choice.stay, sum(largest.blocks))
    home = "pinned host memory" if choice.kept else "their files"
    transformers = {
        "device": f"{models} on the device",
        "turns": f"{models} take turns on the device, from {home}",
        "quantized": f"{models} quantized on the device, from {home}",
        "streamed": f"{models} streamed but for {readable(stays)} of {readable(sum(largest.blocks))}",
    }[plans.transformers_where(plan, count)]
    t5 = "T5 on the device" if plan.t5 == "device" else "T5 streamed"
    decoding = "decoded in strips" if choice.strips else "decoded whole"
    short = "" if plans.fits(choice, room) else "; more than there is, by the numbers"
    return (
        f"memory plan: {plan.name}; {transformers}; {t5}, CLIP and VAE on it; {decoding}; needs "
        f"{readable(choice.device)} of the device and {readable(choice.host)} of the host, of {room.described}"
        f"{short}"
    )
