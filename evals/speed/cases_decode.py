"""Decode of one token, one layer: every method's step in place, at B = 1 and 32. Times are of a graph's replay."""

from collections.abc import Callable
from typing import Any

import torch
from case import Case

from linearize.modeling.launches import Launch
from linearize.modeling.lolcats import LolcatsConfig
from linearize.modeling.mixer import Geometry, Mixer, MixerInput
from linearize.modeling.registry import METHODS

SHAPE = Geometry(heads=32, kv_heads=8, key_dim=128, value_dim=128, hidden=4096)
SEEN = 4096  # a state's size, and so a step's time, does not depend on it
COPIES = 32
"""States that steps take turns on: at B = 1 a single one would be found in the cache, as between layers it is not."""
STEPS = 20  # of one call that a sweep times


def mixer_of(config: Any) -> Mixer:
    torch.manual_seed(0)
    return METHODS[config.name].mixer(config, SHAPE).cuda().requires_grad_(False)


def token(batch: int, **kwargs: Any) -> MixerInput:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(batch, 1, *shape, device="cuda", dtype=torch.bfloat16)

    heads, groups, width = SHAPE.heads, SHAPE.kv_heads, SHAPE.key_dim
    return MixerInput(
        random(SHAPE.hidden),
        random(heads, width),
        random(groups, width),
        random(groups, width),
        scale=width**-0.5,
        q_plain=random(heads, width),
        k_plain=random(groups, width),
        use_cache=True,
        **kwargs,
    )


@torch.no_grad()
def state_of(mixer: Any, batch: int) -> Any:
    """A state that has seen SEEN tokens; its sums are random, and every slot is taken."""
    state = mixer.with_room(mixer(token(batch))[1])
    filled = {n: torch.rand_like(t) for n, t in state._asdict().items() if t.is_floating_point()}
    window = getattr(mixer.config, "window", None) or getattr(mixer.config, "chunk", 0)
    blocks = getattr(mixer, "window_kind", None) == "terraced" or hasattr(mixer.config, "chunk")
    seen = torch.full_like(state.seen, SEEN)
    recurrent = mixer.config.name in ("liger", "lawcat")
    folded = torch.full_like(seen, SEEN if recurrent or not window else SEEN - window * (2 if blocks else 1))
    return state._replace(**filled, seen=seen, folded=folded)


def advance(mixer: Mixer, x: MixerInput, state: Any) -> torch.Tensor:
    """y of a step in place, and the state taken over as a cache layer does it."""
    y, new = mixer(x, state)
    for held, made in zip(state, new, strict=True):
        if made is not held:
            held.copy_(made)
    assert isinstance(y, torch.Tensor)
    return y


def step(config: Any) -> Callable[[int, int], Callable[[], Any]]:
    def make(batch: int, length: int) -> Callable[[], Any]:
        mixer, x = mixer_of(config), token(batch, in_place=True)
        states = [state_of(mixer, batch) for _ in range(COPIES if batch == 1 else 2)]
        turn = 0

        @torch.no_grad()
        def call() -> Any:
            nonlocal turn
            turn += 1
            return advance(mixer, x, states[turn % len(states)])

        return call

    return make


def check(config: Any, count: int = 130) -> Callable[[], None]:
    """A check: steps in place equal steps of the reference, both from a short prompt."""

    @torch.no_grad()
    def run() -> None:
        from linearize.modeling.backend import reference_only

        mixer = mixer_of(config)
        x = token(3)
        outputs = []
        for in_place in (False, True):
            torch.manual_seed(1)
            _, state = mixer(x)
            state = mixer.with_room(state) if in_place else state
            state = type(state)(*(t.clone() for t in state))
            for _ in range(count):
                new = token(3, in_place=in_place)
                if in_place:
                    y = advance(mixer, new, state)
                else:
                    with reference_only():
                        y, state = mixer(new, state)
            outputs.append(y.float())
        difference = (outputs[0] - outputs[1]).abs().max().item()
        assert difference <= 1.5e-2 * max(1.0, outputs[0].abs().max().item()), difference

    return run


def swept(kernel: str, config: Any, batch: int) -> Callable[[Launch], Callable[[], Any]]:
    """STEPS steps under a launch setting, as a graph."""

    def make(settings: Launch) -> Callable[[], Any]:
        from linearize.modeling import launches

        call = step(config)(batch, SEEN)
        table = launches.TABLE[kernel]
        launches.TABLE[kernel] = [settings]
        try:
            call()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(STEPS):
                    call()
        finally:
            launches.TABLE[kernel] = table
        run = lambda: graph.replay()  # noqa: E731
        run.is_replay = True  # type: ignore[attr-defined]
        return run

    return make


def _configs() -> dict[str, tuple[Any, tuple[float, float] | None]]:
    """Name -> the method's setting and its targets in ms at B = 1 and 32."""
    configs: dict[str, tuple[Any, tuple[float, float] | None]] = {
        "LoLCATs, terraced": (LolcatsConfig(), (0.008, 0.035)),
        "LoLCATs, sliding": (LolcatsConfig(window_kind="sliding"), (0.008, 0.035)),
    }
    for name in ("linear", "window", "liger", "lawcat", "salient", "still"):
        configs[name] = (METHODS[name].config(), None)
    return configs


CASES = [
    Case(
        "decode",
        f"{name}, B={batch}",
        step(config),
        check=check(config),
        target_ms=None if targets is None else targets[batch > 1],
        lengths=(2048,),
        batch=batch,
    )
    for name, (config, targets) in _configs().items()
    for batch in (1, 32)
]
SWEEPS = {
    f"{kernel}_step{few}": swept(f"{kernel}_step{few}", config, batch)
    for few, batch in (("", 32), ("_few", 1))
    for kernel, config in {
        "joint": LolcatsConfig(),
        **{name: METHODS[name].config() for name in ("liger", "lawcat", "salient", "still")},
    }.items()
}
