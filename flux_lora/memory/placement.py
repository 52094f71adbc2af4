"""A plan carried out: where each network's weights live, and how they get to the device that computes.

What leaves the device is not copied back: its home, in host memory or in its files, holds the base weights, and
adapters are merged anew when it returns. Streamed blocks live in host memory, and are merged there.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from flux_lora.checkpoint.assembling import Checkpoints, Network, move_buffers
from flux_lora.checkpoint.reading import StoredTensor
from flux_lora.device import devices
from flux_lora.device.transfers import Arena, host_memory, lay_out, release
from flux_lora.errors import DeviceMemoryError
from flux_lora.memory import measure, plans
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

MOST_REQUESTS_BETWEEN = 64
"""Attempts to come back to the plan of set-up: each reads weights anew, and a vain one draws twice."""


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def place(
    checkpoints: Checkpoints,
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
    log: Log,
    scheme: Scheme | None = None,
    room: Room | Callable[[], Room] | None = None,
) -> "Placement":
    """Choose a memory plan for what there is room for, say so, and load the weights as it says.

    Args:
        checkpoints: networks without weights.
        settings: the operator's.
        device: computes.
        dtype: of the weights.
        log: receives one readable line at a time.
        scheme: how the speed profile quantizes transformers, if it does; what is streamed is not quantized.
        room: what the models may take, or what says so at any time; None: what is measured.

    Raises:
        DeviceMemoryError: no plan fits; the message holds the numbers.
        WeightsError: a file cannot be read.
    """
    sizes = measure.needed_sizes(checkpoints.networks, dtype)
    if isinstance(room, Room):
        look: Callable[[], Room] = partial(lambda given: given, room)
    else:
        look = room or measure.remeasured(device, settings.memory_budget)
    choice = plans.choose_plan(sizes, look(), lossy=scheme is not None, named=settings.memory_plan)
    memory = Placement(checkpoints, sizes, look, choice, device, log, scheme)
    log(memory.describe())
    memory.with_fallback(lambda: memory.load_model(next(iter(checkpoints.networks))))
    return memory


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


@dataclass(frozen=True)
class Home:
    """Where a network's base weights wait in host memory."""

    whole: tuple[str, ...]
    """The parameters that go to the device as a whole: neither streamed nor quantized."""
    base: Arena | None
    """Their base weights; None: they are read from their files."""
    precise: Arena | None
    """The base weights of what is quantized; None: they are read from their files."""
    stream: Stream | None
    """Sends the blocks that are streamed."""


@dataclass
class Placed:
    """One network, and where its weights are: nowhere, at home, or at home and on the device."""

    component: str
    network: Network
    device: torch.device
    orders: Orders
    quantized: Mapping[str, QuantizedLinear] = field(default_factory=dict)
    """The layers in eight bits by the names of the weights that they stand for."""
    when_unloaded: list[Callable[[Sequence[str]], None]] = field(default_factory=list)
    """Called with the names of parameters whose weights are freed: when they come back, they are the base weights."""
    home: Home | None = None
    """None: nothing is in memory."""
    on_device: bool = False
    """Whether all that is not streamed is on the device."""
    fused: bool = False
    """Whether query, key and value are one product, where nothing is streamed."""

    @property
    def stream(self) -> Stream | None:
        """What sends the network's blocks, if they are streamed and in memory."""
        return self.home.stream if self.home else None

    def make_home(self) -> Reads:
        """Make room in host memory as ordered; returns what is to be read for that."""
        reads: Reads = []
        streamed: Mapping[str, Tensor] = {}
        stream = None
        if self.orders.where == "streamed":
            stream, streamed = self._make_stream()
            reads += self._reads(streamed)
        elsewhere = streamed.keys() | self.quantized.keys()
        whole = projections.in_order(name for name in self.network.parameters if name not in elsewhere)
        base = precise = None
        if self.orders.leaves and self.orders.kept:
            base = self._lay_out(whole, lambda size: host_memory(size, self.device))
            precise = self._lay_out(self.quantized, lambda size: host_memory(size, self.device))
            reads += self._reads(base.tensors) + self._reads(precise.tensors)
        self.home = Home(whole, base, precise, stream)
        return reads

    def move_in(self, home: Home) -> Reads:
        """Bring to the device what is not streamed; returns what is to be read for that."""
        for layer in self.quantized.values():
            layer.move(self.device)
        move_buffers(self.network.module, self.device)
        there = self._lay_out(home.whole, lambda size: torch.empty(size, dtype=torch.uint8, device=self.device))
        if home.base:
            there.memory.copy_(home.base.memory, non_blocking=True)
        for name, tensor in there.tensors.items():
            self.network.parameters[name].data = tensor
        for name, layer in self.quantized.items():
            base = home.precise.tensors[name] if home.precise else self.network.readers[name]().to(layer.dtype)
            layer.write_rows(0, len(base), base)
        self.on_device = True
        self._fuse()
        return [] if home.base else self._reads(there.tensors)

    def make_way(self) -> None:
        """Leave the device, if so ordered."""
        if self.stream:
            self.stream.free_slots()
        if self.orders.leaves and not self.orders.kept:
            self.unload()
        elif self.orders.leaves and self.on_device and self.home:
            self.on_device = False
            self._free((*self.home.whole, *self.quantized))

    def unload(self) -> None:
        """Free all memory."""
        if self.stream:
            self.stream.end()
        self._free(self.network.parameters)
        self.home, self.on_device = None, False

    def fuse(self) -> None:
        """Compute query, key and value as one from now on, now and whenever the weights are on the device."""
        self.fused = True
        if self.on_device:
            self._fuse()

    def base(self, name: str) -> Tensor | Callable[[], Tensor] | None:
        """Where the base weights of a parameter are beside itself; None: nowhere, so they are to be kept."""
        if not self.home or not self.orders.leaves:
            return None
        for names, arena in ((self.quantized, self.home.precise), (self.home.whole, self.home.base)):
            if name in names:
                return arena.tensors[name] if arena else self.network.readers[name]
        return None

    def _make_stream(self) -> tuple[Stream | None, Mapping[str, Tensor]]:
        names = measure.block_names(self.component, self.network)
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
            stream.reset()
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

    def _free(self, names: Iterable[str]) -> None:
        names = list(names)
        if self.fused:
            projections.separate(self.network.module)  # the whole would keep the memory of its parts
        self.network.unload(names)
        for layer in self.quantized.values():
            layer.move(torch.device("meta"))
        for call in self.when_unloaded:
            call(names)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Let memory that runs out be the fault of what a request brought, for which no plan is changed.

    Args:
        what: begins the message.

    Raises:
        DeviceMemoryError: it ran out.
    """
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise DeviceMemoryError(
            f"{what} takes more memory than there is ({_shortage(error)}): use one of a lower rank, or fewer at once."
        ) from None


def _shortage(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


@dataclass
class _Return:
    """When to come back to a plan that a request has left: at once, and after each vain attempt twice as late."""

    due: int = 1
    """Requests from the last attempt to the next."""
    waited: int = 0
    left_for: Choice | None = None
    """The smaller plan, which was enough; it is taken at once when the attempt is vain."""

    def is_due(self) -> bool:
        """Count a request."""
        self.waited += 1
        return self.waited >= self.due

    def attempt(self, smaller: Choice) -> None:
        """Begin an attempt."""
        self.due, self.waited, self.left_for = min(2 * self.due, MOST_REQUESTS_BETWEEN), 0, smaller


class Placement:
    """All networks of a server under one plan, and under a smaller one while memory does not suffice."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        sizes: Sizes,
        room: Callable[[], Room],
        choice: Choice,
        device: torch.device,
        log: Log,
        scheme: Scheme | None = None,
    ) -> None:
        """Take networks without weights; `load_model` loads them."""
        self._sizes, self._room, self._device, self._log = sizes, room, device, log
        self._load_weights = checkpoints.fill
        self.choice = self._best = choice
        self._by_the_numbers = plans.fits(choice, room())  # a plan that was named may not fit
        self._return = _Return()
        shared = next(iter(checkpoints.networks.values()))
        self._placed: dict[str, Placed] = {}
        for key, component, network in (
            *((name, name, network) for name, network in shared.items() if name != "transformer"),
            *((model, "transformer", networks["transformer"]) for model, networks in checkpoints.networks.items()),
        ):
            self._placed[key] = Placed(component, network, device, self._orders(component))
        self.spare: list[Callable[[], bool]] = []
        """Free what is held for speed alone, when memory has run out; each says whether there was anything."""
        self._models = tuple(checkpoints.networks)
        self._quantizes = scheme is not None and not self.streams_transformers
        if scheme and self._quantizes:
            for model in self._models:
                self._placed[model].quantized = prepare(self._placed[model].network.module, scheme)
        elif scheme:
            log("the transformers' blocks are streamed, and so not quantized")

    @property
    def models_on_device(self) -> tuple[str, ...]:
        """The models whose transformers are on the device now."""
        return tuple(model for model in self._models if self._placed[model].on_device)

    @property
    def streams_transformers(self) -> bool:
        """Whether the transformers' blocks pass through the device."""
        return any(self._placed[model].orders.where == "streamed" for model in self._models)

    @property
    def transformers_stay(self) -> bool:
        """Whether the transformers' weights stay where they are on the device."""
        orders = [self._placed[model].orders for model in self._models]
        return not any(each.leaves or each.where == "streamed" for each in orders)

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

    def load_model(self, model: str) -> None:
        """Bring a model's transformer, and what every model needs, to the device."""
        for placed in self._placed.values():
            if placed.stream:
                placed.stream.reset()
        for other in self._models:
            if other != model:
                self._placed[other].make_way()
        self._load(model)

    def after_encoding(self) -> None:
        """Free what the text encoders took for their work, which is done."""
        if stream := self._placed["text_encoder_2"].stream:
            stream.free_slots()

    def with_fallback(self, work: Callable[[], Done]) -> Done:
        """Do some work of set-up; when memory runs out, do all of it again under the next plan of the same precision.

        Requests are then served under that plan.

        Args:
            work: may be done twice.

        Raises:
            DeviceMemoryError: memory ran out under both plans, or there is no smaller one.
        """
        try:
            return self._fall_and_retry(work, lambda: None)
        finally:
            self._best = self.choice

    def serve(self, work: Callable[[], Done], before_retry: Callable[[], None]) -> Done:
        """Do a request's work; when memory runs out, do all of it again under the next plan of the same precision.

        The next request comes back to the plan of set-up, if there is room. If memory runs out once more, then the next
        but one does, and so on, twice as late each time, until one is served under that plan.

        Args:
            work: may be done twice; nothing of an earlier request is running.
            before_retry: ends what the first attempt has left running.

        Raises:
            DeviceMemoryError: memory ran out under both plans, or there is no smaller one.
        """
        if self.choice != self._best and self._return.is_due() and self._has_room_for_best():
            self._return.attempt(self.choice)
            self._change(self._best)
            self._log("there may be room again: back to the plan of set-up")
            self._log(self.describe())
        done = self._fall_and_retry(work, before_retry)
        if self.choice == self._best:
            self._return = _Return()
        return done

    def _fall_and_retry(self, work: Callable[[], Done], before_retry: Callable[[], None]) -> Done:
        tried: list[str] = []
        while True:
            try:
                return work()
            except Exception as error:
                if not ran_out(error):
                    raise
                shortage = _shortage(error)
            # Only here, beyond the handler, is free what the failed attempt had allocated: the traceback held it.
            before_retry()
            freed = [free() for free in self.spare]
            release(self._device)
            if any(freed):
                self._log(f"out of memory ({shortage}): all of it again, without what was held for speed")
                continue
            tried.append(self.choice.plan.name)
            if len(tried) == 2 or not self._fall():
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
        return describe(self.choice, self._sizes, self._room())

    def _has_room_for_best(self) -> bool:
        return not self._by_the_numbers or plans.fits(self._best, self._room())

    def _fall(self) -> bool:
        """Change to the next plan of the same precision; False, and nothing is changed, when there is none."""
        smaller, self._return.left_for = self._return.left_for, None
        try:
            smaller = smaller or plans.choose_plan(self._sizes, self._room(), lossy=self._quantizes, after=self.choice)
        except DeviceMemoryError:
            return False
        self._change(smaller)
        return True

    def _change(self, choice: Choice) -> None:
        """Let the weights live as another plan says, from the next `load_model` on."""
        self.choice = choice
        for placed in self._placed.values():
            orders = self._orders(placed.component)
            if orders != placed.orders:
                placed.unload()
                placed.orders = orders
        release(self._device)

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
            if key == model or not placed.orders.leaves or (placed.orders.kept and not placed.home)
        ]
        arriving = [p for p in wanted if not p.on_device and (p is self._placed[model] or not p.orders.leaves)]
        changing = [placed for placed in wanted if not placed.home or placed in arriving]
        try:
            reads: Reads = []
            for placed in wanted:
                reads += [] if placed.home else placed.make_home()
            waiting = []
            for placed in arriving:
                if placed.home and placed.home.base:
                    waiting.append((placed, placed.home))  # its home is filled first
                elif placed.home:
                    reads += placed.move_in(placed.home)
            if reads:
                self._load_weights(reads)
            for placed, home in waiting:
                placed.move_in(home)
        except BaseException:
            for placed in changing:
                placed.unload()
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
