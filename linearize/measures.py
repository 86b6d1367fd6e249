"""Sections of a recipe that say what is measured, and beside which controls."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from .methods import read_whole
from .sections import Count, Positive, RecallTask, Section, Share

SuiteTask = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "passkey",
    "passkey_legacy",
    "kv_number",
    "kv_uuid",
    "copying_fresh_16",
    "copying_fresh_64",
    "copying_fresh_256",
    "copying_fresh_1024",
    "copying_natural_16",
    "copying_natural_64",
    "copying_natural_256",
    "copying_natural_1024",
    "qa1",
    "qa2",
    "qa3",
]


class Control(Section):
    """Students that have a part of the method and the same training: what the whole has to beat.

    ``matched_window`` is a window of as many bytes as the student's state; ``softmax`` is the teacher,
    fine-tuned alike, with nothing converted.
    """

    enabled: bool = False
    methods: list[Literal["window", "linear", "matched_window", "softmax"]] = Field(
        default=["window"], min_length=1
    )
    window: Positive | None = None
    sinks: Count = 0

    @model_validator(mode="after")
    def _window_is_asked_for(self) -> "Control":
        for key in ("window", "sinks"):
            if getattr(self, key) and "window" not in self.methods:
                raise ValueError(
                    f"{key}: {getattr(self, key)} is of the window control; add 'window' to methods"
                )
        return self


class Suite(Section):
    """The recall suite, in generated answers and by likelihood; empty of tasks and preset, it is not run.

    A preset sets the prompts of each task and length (50, 100 or 500), and means every task where none is named.
    ``haystack`` is ``held_out``, ``noise``, or a text file. ``chat`` asks in the tokenizer's chat template, which many
    base models have too: it is for teachers that were tuned to chat.
    """

    preset: Literal["smoke", "standard", "publication"] | None = None
    tasks: list[SuiteTask] = []
    lengths: Annotated[list[Positive], Field(min_length=1)] | None = None
    samples: Positive | None = None
    depths: list[Share] = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    fill: Literal["grid", "ruler"] = "grid"
    haystack: Annotated[str, Field(min_length=1)] = "held_out"
    chat: bool = False
    seed: Annotated[Count, Field(lt=2**32)] = 42

    @property
    def wanted(self) -> bool:
        return bool(self.tasks or self.preset)


class Ablations(Section):
    """Branches switched off and states zeroed at evaluation; ``per_layer`` for each layer too, not only for all."""

    enabled: bool = False
    per_layer: bool = True


class Continuation(Section):
    """Teacher and students write on after the same held-out prompts, greedily; without ``prompts`` it is not run.

    ``prompt_tokens`` of text stand before up to ``tokens`` that are written. A usual count is 100 prompts.
    """

    prompts: Count = 0
    prompt_tokens: Positive = 64
    tokens: Annotated[int, BeforeValidator(read_whole), Field(ge=4)] = 512

    @property
    def wanted(self) -> bool:
        return self.prompts > 0


class LmEvalTasks(Section):
    """Tasks of lm-eval by name, its own or those of a local ``folder``; also ``zero-shot`` and ``mmlu``.

    ``limit`` takes the first samples of every task alone.
    """

    tasks: list[str] = []
    folder: str | None = None
    num_fewshot: Count | None = None
    limit: Positive | None = None
    batch_size: Positive = 4

    @model_validator(mode="after")
    def _a_folder_is_for_tasks(self) -> "LmEvalTasks":
        if self.folder is not None and not self.tasks:
            raise ValueError(f"folder: {self.folder} is given, but no tasks; name some of its own in tasks")
        return self


class Evaluate(Section):
    """What is measured on the saved folder, reloaded, beside a separately loaded teacher."""

    seq_lens: list[Annotated[int, BeforeValidator(read_whole), Field(ge=2)]] = [1024]
    sequences: Positive = 32
    batch_size: Positive = 4
    recall_lens: list[Positive] = [512, 1024]
    recall_tasks: list[RecallTask] = ["passkey", "number_in_text"]
    recall_samples: Positive = 50
    generate_tokens: Count = 60
    gates: bool = True
    ablations: Ablations = Ablations()
    prompt: str | None = None
    suite: Suite = Suite()
    continuation: Continuation = Continuation()
    lm_eval: LmEvalTasks = LmEvalTasks()
    length_gate: bool = False
    """Measure at 1, 2, 4 and 8 times data.seq_len too, and hold the student against the window control there."""
