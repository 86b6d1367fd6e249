"""What sections of a recipe are made of, and the sections that say what is tried and what a student may cost."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from .methods import STRICT, read_number, read_whole

Count = Annotated[int, BeforeValidator(read_whole), Field(ge=0)]
Positive = Annotated[int, BeforeValidator(read_whole), Field(ge=1)]
Rate = Annotated[float, BeforeValidator(read_number), Field(ge=0)]
PositiveRate = Annotated[float, BeforeValidator(read_number), Field(gt=0)]
Share = Annotated[float, BeforeValidator(read_number), Field(ge=0, le=1)]
RecallTask = Literal[
    "passkey",
    "number_in_noise",
    "number_in_text",
    "uuid_in_text",
    "number_of_4_in_text",
    "number_of_16_in_text",
]


def read_share(value: Any) -> Any:
    """``6%`` is 0.06; other values as they are."""
    if isinstance(value, bool):
        raise ValueError("should be a number or a percentage such as 6%")
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            raise ValueError("should be a number or a percentage such as 6%") from None
    return value


def read_length(value: Any) -> Any:
    """``32k`` is 32,768 tokens; other values as whole numbers."""
    if isinstance(value, str) and value.strip().lower().endswith("k"):
        try:
            value = float(value.strip()[:-1]) * 1024
        except ValueError:
            raise ValueError("should be a number of tokens such as 4096 or 32k") from None
    return read_whole(value)


Length = Annotated[int, BeforeValidator(read_length), Field(ge=1)]
KvShare = Annotated[float, BeforeValidator(read_share), Field(gt=0)]
PartShare = Annotated[float, BeforeValidator(read_share), Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the recipe: immutable, finite, and free of keys that nobody reads."""

    model_config = STRICT


class Scan(Section):
    """What is tried in each layer alone, and what it is measured on: training text and recall prompts of its own."""

    budgets: list[Count] = [0, 32, 128, 256, 512, 1024, 2048]
    """Salient's N; those that would hold all of ``seq_len`` are left out. Empty where the method is another."""
    chunks: list[Positive] | None = None
    """Salient's C, each with every budget; None: the method's own."""
    windows: list[Positive] = [64]
    """Sliding windows with the first token kept."""
    methods: list[str] = []
    """Further methods by name, with their defaults, untrained or after ``transfer_tokens``."""
    transfer_tokens: Count = 0
    """Tokens of transfer that trained candidates get, all layers at once, before they are measured one by one."""
    seq_len: Length = 1024
    sequences: Positive = 4
    recall_tasks: list[RecallTask] = ["number_in_text"]
    recall_lens: list[Length] | None = None
    """None: ``seq_len`` alone."""
    recall_samples: Positive = 8
    batch_size: Positive = 8
    score_fit: Annotated[PartShare, Field(gt=0)] = 0.5
    """Share of its target's variance that Salient's untrained stand-in explains; trained scores reach about half."""
    heads: bool | list[Count] = False
    """Also every kv head alone, of all layers or of those listed; a plan of bytes then gives heads their own N."""
    selectors: bool = True
    """Also rank the layers as papers do, for comparison."""


class Plan(Section):
    """What a student may cost: exactly one of ``kv_share``, ``state_mb``, ``softmax_layers``, ``decode_us``."""

    kv_share: KvShare | None = None
    """Of the teacher's KV cache at ``at`` tokens, such as 6%."""
    state_mb: PositiveRate | None = None
    """MiB of state of ``batch`` sequences at ``at`` tokens."""
    softmax_layers: Count | None = None
    """How many layers keep softmax; all others get ``method`` as it is."""
    decode_us: PositiveRate | None = None
    """Microseconds a token of all layers together, by the table ``times``."""
    times: str | None = None
    """A JSON file {"layer_us": {candidate: microseconds of one layer}}, measured on the machine that serves."""
    scan: str | None = None
    """Folder of a `linearize scan` of this teacher to plan from, instead of a scan of the run's own."""
    at: Length | None = None
    """Tokens at which memory is counted; None: the teacher's context."""
    batch: Positive = 1
    min_recall: PartShare | None = None
    """Least share of the scan's prompts that the teacher answers and the plan may be expected to answer still."""
    recall_weight: Rate = 0.1
    """Nats of KL that a nat lost per answer token counts as."""
    softmax: bool = False
    """Whether layers may keep softmax, whose memory grows, under a budget of bytes or time."""
    verify: Count = 3
    """How many of the best plans are measured whole, untrained."""

    @model_validator(mode="after")
    def _one_budget(self) -> "Plan":
        names = ("kv_share", "state_mb", "softmax_layers", "decode_us")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            told = " and ".join(given) or "no budget"
            raise ValueError(
                f"{given[0] if given else names[0]}: {told} given; give exactly one of {', '.join(names)}"
            )
        if (self.decode_us is None) != (self.times is None):
            raise ValueError(
                "times: give decode_us together with times, a JSON table of measured microseconds"
            )
        return self


def read_plan(value: Any) -> Any:
    """``auto`` is a tenth of the KV cache."""
    return {"kv_share": 0.1} if value == "auto" else value
