"""What a training run is: the configuration that a recipe returns and the command line overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from jaxdistill import partition
from jaxdistill.checkpoint.retention import Retention
from jaxdistill.choices import check_choices
from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.aligned import ACROSS_TOKENIZERS
from jaxdistill.losses.alm import ALM
from jaxdistill.losses.hidden import HiddenMatch
from jaxdistill.losses.router import RouterTerm
from jaxdistill.losses.terms import CrossEntropy, ForwardKL, Term
from jaxdistill.models.decoder import Execution
from jaxdistill.models.lora import Lora
from jaxdistill.objective import AnyTerm, Weighting
from jaxdistill.optimizer import AdamW, Optimizer, WarmupCosine
from jaxdistill.prune.choose import Target
from jaxdistill.prune.depth import Depth
from jaxdistill.prune.measure import Activations, Scorer
from jaxdistill.prune.slice import NormRepair
from jaxdistill.sharding import DEFAULT_RULES, MeshConfig, Rules
from jaxdistill.specs import ModelConfig

DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correction:
    """What a teacher learns while it teaches, on the same batches: a light fine-tuning on the text that it is asked
    about (LLM Pruning and Distillation in Practice, 2408.11796)."""

    losses: dict[str, Term] = dataclasses.field(default_factory=lambda: {"cross_entropy": CrossEntropy()})
    optimizer: Optimizer = dataclasses.field(default_factory=lambda: AdamW(learning_rate=WarmupCosine(peak=2e-5)))

    def __post_init__(self):
        if not self.losses or any(isinstance(term, ForwardKL) for term in self.losses.values()):
            raise ValueError(
                f"Correction.losses is {self.losses}; give terms on the text, such as CrossEntropy: a teacher has no "
                "distance from itself."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The model that is imitated."""

    path: str | None = None
    """A directory that `jaxdistill convert` wrote, a Hugging Face directory, or a .gguf file. None trains on text
    alone."""
    parameter_dtype: DType = "float32"
    """How the teacher is held; a student that is made of its layers starts from these values."""
    correction: Correction | None = None
    """None leaves it as it is. Otherwise it learns, costs what a student of its size costs, and is saved with the run's
    checkpoints."""
    execution: Execution = dataclasses.field(default_factory=Execution)
    rules: Rules = DEFAULT_RULES
    """Where its parameters live on the mesh."""

    def __post_init__(self):
        check_choices(self)
        if self.correction is not None and self.parameter_dtype != "float32":
            raise ValueError(
                f"teacher.parameter_dtype is {self.parameter_dtype} and teacher.correction is set; a teacher that "
                "learns is held in float32, or small steps would be lost to rounding."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The model that learns. It starts as (part of) a model on disk, or fresh from `model`."""

    path: str | None = None
    """The model to start from; None is the teacher."""
    prune: Target = dataclasses.field(default_factory=Target)
    """Its sizes, where they are smaller: the most important parts are kept, as measured before the first step."""
    scorer: Scorer = dataclasses.field(default_factory=Activations)
    """What importance is."""
    depth: Depth = "scorer"
    """How the layers of `prune.layers`, where that is a number, are chosen (`prune.depth`)."""
    calibration_batches: int = 16
    """Training batches that importance is measured on."""
    plan: str | None = None
    """Cut it by this file (see `jaxdistill prune`) instead of `prune`."""
    norm_repair: NormRepair = "none"
    """What becomes of norms when channels go (`prune.slice.prune_model`)."""
    model: ModelConfig | None = None
    """A fresh model of this shape, instead of one on disk."""
    tokenizer: str | None = None
    """A path, or "bytes". None is the model's own, of a fresh model the teacher's. A model that has another one is
    moved to this: its embedding, and a head of its own, are made anew from the rows of the tokens that spell the new
    ones (`retokenize`)."""
    suffixes: bool = False
    """With the tokenizer "bytes": it also keeps the old embedding, frozen, and adds to its input that of the longest
    old token which ends at each byte. No Hugging Face format holds such a model: with export="jaxdistill"."""
    trainable: tuple[str, ...] = ("*",)
    """Shell patterns of the parameters that are trained (`segments.*`, `*.norm.scale`); the rest is frozen. With
    `lora`, what is trained in full besides the adapters, and "*" stands for nothing. The embedding of suffixes is
    trained where a pattern begins with it (`suffixes.*`)."""
    lora: Lora | None = None
    """Train low-rank adapters of the kernels that it names, and merge them into the student that is written. What is
    frozen then shares the teacher's memory where the student starts from the teacher."""
    execution: Execution = dataclasses.field(default_factory=Execution)
    rules: Rules = DEFAULT_RULES

    @property
    def moved(self) -> bool:
        """Whether a model on disk, or the teacher, is moved to another tokenizer."""
        return self.tokenizer is not None and self.model is None

    @property
    def trained(self) -> Callable[[str], bool]:
        """Whether a parameter of this name, in the stacked form, is trained in full."""
        patterns = self.trainable if self.lora is None else tuple(p for p in self.trainable if p != "*")
        chosen = partition.matches(patterns)
        named = partition.matches([pattern for pattern in patterns if pattern.startswith("suffixes.")])
        return lambda name: named(name) if name.startswith("suffixes.") else chosen(name)

    def __post_init__(self):
        check_choices(self)
        sources = [n for n in ("path", "model") if getattr(self, n) is not None]
        if len(sources) > 1:
            raise ValueError("StudentConfig.path and StudentConfig.model are both given; a student starts from one.")
        if self.plan is not None and not self.prune.changes_nothing:
            raise ValueError("StudentConfig.plan and StudentConfig.prune are both given; a plan has its own sizes.")
        if self.model is not None and (self.plan is not None or not self.prune.changes_nothing):
            raise ValueError("StudentConfig.model is made fresh in its own sizes; leave out `prune` and `plan`.")
        if self.plan is not None and self.depth != "scorer":
            raise ValueError(
                f"StudentConfig.depth is {self.depth} and StudentConfig.plan is given, which says what layers stay; "
                "leave one of them out."
            )
        if self.model is not None and self.lora is not None:
            raise ValueError("StudentConfig.model is made fresh: there is nothing to adapt; leave out `lora`.")
        if self.model is not None and self.model.suffixes is not None:
            raise ValueError("StudentConfig.model.suffixes is what a model on disk once knew; leave it out.")
        if self.suffixes and not self.moved:
            raise ValueError(
                "StudentConfig.suffixes keeps the embedding of a model that is moved to bytes; give "
                'tokenizer="bytes" too.'
            )
        if self.calibration_batches < 1:
            raise ValueError(f"StudentConfig.calibration_batches is {self.calibration_batches}; it must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """Evaluation during training, on text that is not trained on."""

    path: str | None = None
    """Text as in DataConfig.path; None evaluates nothing."""
    split: str = "test"
    """The split, where `path` is a TFDS directory."""
    every: int = 100
    """Steps between evaluations. The start and every checkpoint are evaluated too, so that the best one is known."""
    windows: int = 64
    """Rows of DataConfig.length tokens, from the beginning of the text."""

    def __post_init__(self):
        if self.every < 1 or self.windows < 1:
            raise ValueError(f"{self}: `every` and `windows` must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved, and what is kept."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    retention: Retention = dataclasses.field(default_factory=Retention)

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"CheckpointConfig.every is {self.every}; it must be at least 1 step.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training, besides RUN/metrics.jsonl."""

    every: int = 10
    """Steps between lines; their values are means over the steps in between."""
    tensorboard: bool = True
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (extra `[wandb]`)."""

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"LogConfig.every is {self.every}; it must be at least 1 step.")


HELD_OUT_NAMES = ("cross_entropy", "kl", "agreement", "bits_per_byte")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A distillation run."""

    out: str
    """The run's directory. One that holds checkpoints of this configuration is resumed."""
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    losses: dict[str, AnyTerm] = dataclasses.field(default_factory=lambda: {"kl": ForwardKL()})
    """The objective: the sum of these terms, each times its weight. With `ALM`, `ULD`, `MinED` or `DSKD` among them the
    text goes through both models' tokenizers, which may differ."""
    weighting: Weighting = "fixed"
    """Or "gradient_magnitude": every term moves the student as much as its weight says, see `objective.Weighting`."""
    optimizer: Optimizer = dataclasses.field(default_factory=lambda: AdamW(learning_rate=WarmupCosine(peak=1e-4)))
    steps: int = 1000
    accumulate: int = 1
    """Micro-batches per step; changes memory, not results."""
    chunk: int | None = None
    """Positions that the head scores at once on each device; None chooses by the vocabulary."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    held_out: HeldOutConfig = dataclasses.field(default_factory=HeldOutConfig)
    checkpoints: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    export: Literal["huggingface", "jaxdistill", "none"] = "huggingface"
    """What RUN/student is written as when the run is finished. A student whose layers differ, or whose shards are
    spread over several processes, is written as our own checkpoint, which `jaxdistill convert` reads."""
    export_dtype: DType = "float32"
    stop_after_skipped: int = 20
    """Stop when this many steps in a row had a loss or gradient that is not finite."""
    seed: int = 0
    compilation_cache: str | None = None
    """Where compiled programs are kept for later runs; None is `xla` in the cache directory, "none" keeps none."""
    processes: Literal["one", "automatic"] = "one"
    """"automatic" joins the processes of a pod or cluster through jax.distributed."""

    def __post_init__(self):
        check_choices(self)
        for name in ("steps", "accumulate", "stop_after_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"TrainConfig.chunk is {self.chunk}; it must be at least 1, or None.")
        if not self.losses:
            raise ValueError("TrainConfig.losses is empty; give at least one term.")
        taken = sorted(n for n, term in self.losses.items() if n in HELD_OUT_NAMES and isinstance(term, ALM))
        if taken:
            raise ValueError(
                f"losses {taken} are ALM terms under names of what held-out text is measured by; rename them."
            )
        routed = sorted(name for name, term in self.losses.items() if isinstance(term, RouterTerm))
        if routed and self.weighting != "fixed":
            raise ValueError(
                f"losses {routed} are on routers, which no gradient by hidden states tells the size of; use weighting "
                '"fixed".'
            )
        on_states = {name: term for name, term in self.losses.items() if isinstance(term, HiddenMatch)}
        for name, term in on_states.items():
            others = sorted(self.losses.keys() - on_states.keys())
            if term.balance is not None and term.balance not in others:
                raise ValueError(
                    f"losses.{name} is balanced with {term.balance!r}; allowed are the terms on scores: {others}."
                )
            if term.balance is not None and self.weighting != "fixed":
                raise ValueError(
                    f"losses.{name} is balanced with {term.balance!r}, and weighting is {self.weighting}: both set its "
                    "size. Leave one of them out."
                )

    @property
    def aligned(self) -> bool:
        """Whether the text goes through the tokenizers of both models."""
        return any(isinstance(term, ACROSS_TOKENIZERS) for term in self.losses.values())

    def check(self) -> None:
        """Refuses what cannot run, before any device is touched."""
        if not self.out:
            raise ValueError("no run directory; give --out DIR.")
        if self.data.path is None and not self.data.sources:
            raise ValueError("nothing to train on; give --data.path FILE (text, JSONL, Parquet, ArrayRecord, TFDS).")
        if self.teacher.path is None and self.student.path is None and self.student.model is None:
            raise ValueError("no model; give --teacher.path DIR (and --student.path DIR for a student of its own).")
        if self.student.depth != "scorer" and not isinstance(self.student.prune.layers, int):
            raise ValueError(
                f"student.depth {self.student.depth} chooses layers; say how many to keep with student.prune.layers."
            )
        self._check_teacher()
        adapted = partition.matches(self.student.lora.targets if self.student.lora else ())
        if self.student.moved and not (self.student.trained("embedding.kernel") or adapted("embedding.kernel")):
            raise ValueError(
                f"student.tokenizer makes a new embedding, and neither student.trainable {self.student.trainable} nor "
                'student.lora reaches it: it would never learn. Add "embedding.*" (and "head.*") to student.trainable.'
            )
        if self.student.suffixes and self.export == "huggingface":
            raise ValueError(
                "student.suffixes makes a model that no Hugging Face format can hold; give --export jaxdistill."
            )
        if self.data.teacher_length is not None and not self.aligned:
            raise ValueError(
                "data.teacher_length is set and no loss compares two tokenizations; leave it out, or add one (ALM)."
            )
        if self.teacher.path is None and self.student.model is not None and self.student.tokenizer is None:
            raise ValueError('a fresh student without a teacher needs --student.tokenizer PATH, or "bytes".')

    def _check_teacher(self) -> None:
        """Refuses what needs a teacher where there is none."""
        needs = [name for name, term in self.losses.items() if isinstance(term, (HiddenMatch, *ACROSS_TOKENIZERS))]
        if self.teacher.path is None and needs:
            raise ValueError(
                f"losses {needs} compare the student with a teacher and there is none; give --teacher.path DIR."
            )
        if self.teacher.path is None and self.teacher.correction is not None:
            raise ValueError("teacher.correction is set and there is no teacher; give --teacher.path DIR.")


MAY_CHANGE = frozenset(
    {
        "out",
        "log",
        "checkpoints",
        "held_out.every",
        "mesh",
        "accumulate",
        "chunk",
        "export",
        "export_dtype",
        "compilation_cache",
        # The loader compares the data itself, by fingerprint.
        "data.path",
    }
    | {"processes", "stop_after_skipped", "data.prefetch_batches"}
    | {f"{model}.{field}" for model in ("teacher", "student") for field in ("execution.remat", "rules")}
)
"""What a resume may give differently: nothing here changes what is computed, beyond rounding."""

ADDED = {"data.chunks": "minimal", "weighting": "fixed", "student.suffixes": False, "student.depth": "scorer"}
"""Fields that older runs lack, and the value at which they change nothing."""


def batch_divisors(config: TrainConfig, devices: int, *, processes: int = 1) -> None:
    """Refuses a batch that the mesh and accumulation do not divide, with the nearest legal sizes."""
    sizes = config.mesh.sizes(devices)
    rows = sizes["data"] * sizes["fsdp"] * config.accumulate
    if config.data.batch_size % rows:
        below = config.data.batch_size // rows * rows
        legal = " or ".join(str(n) for n in (below, below + rows) if n)
        raise ValueError(
            f"data.batch_size is {config.data.batch_size}, which data {sizes['data']} x fsdp {sizes['fsdp']} devices x "
            f"{config.accumulate} micro-batches (= {rows}) do not divide; the nearest legal sizes are {legal}."
        )
    if (sizes["data"] * sizes["fsdp"]) % processes:
        raise ValueError(
            f"data {sizes['data']} x fsdp {sizes['fsdp']} devices split the rows of a batch, which {processes} "
            "processes do not divide; every process feeds rows of its own: give data or fsdp a multiple of them."
        )
    for name in ("length", "teacher_length"):
        length, shards = getattr(config.data, name) or 0, sizes["sequence"]
        if length % shards:
            raise ValueError(
                f"data.{name} is {length}, which {shards} sequence shards do not divide; use a multiple of {shards}."
            )


def as_document(config: Any) -> Any:
    """A configuration as JSON values, for the run's directory and for comparison on resume."""
    return _document(config)


def _document(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _document(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__qualname__, **fields}
    if isinstance(value, dict):
        return {str(key): _document(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_document(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    # A function (a schedule, an optax transformation): its name is what can be compared.
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
